"""What a run can know before it touches a device: its numbers, folder, checkpoints' fit."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import cli, log
from pipeline.config import rules
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape, derive
from pipeline.distributed.ranks import Ranks, placement_warning
from pipeline.errors import CheckpointError, MachineError, Problems
from pipeline.files import write_durably

if TYPE_CHECKING:
    from pipeline.checkpoint.record import CheckpointRecord

# fp32 weights and two moments in a checkpoint.
CHECKPOINT_BYTES_PER_PARAMETER = 12


def memory_advice(cfg: PretrainConfig, ranks: Ranks) -> str:
    """What the device was asked to hold, and the settings that would lower it."""
    from pipeline.data.datasets import describe
    from pipeline.planning import memory

    vocab_size = describe(cfg.data).vocab_size
    return memory.advice(
        cfg, derive(cfg, world_size=ranks.world_size, tokenizer_vocab_size=vocab_size)
    )


def check(cfg: PretrainConfig, *, world_size: int) -> tuple[RunShape, Path]:
    """The run's numbers and its folder, after every check that costs no device time.

    Leaves no trace: nothing is written, so a start that is refused has changed nothing.

    Raises:
        PipelineError: settings, data, folder or checkpoints do not fit together; all that is wrong
            is named.
    """
    from pipeline.data.datasets import describe

    problems, vocab_size = Problems(), None
    with problems:
        vocab_size = describe(cfg.data).vocab_size
    with problems:
        rules.check(cfg, world_size=world_size, tokenizer_vocab_size=vocab_size)
    problems.raise_all()
    assert vocab_size is not None
    shape = derive(cfg, world_size=world_size, tokenizer_vocab_size=vocab_size)
    run_dir = Path(cfg.runs_dir) / cfg.name
    with problems:
        check_folder(cfg, shape, run_dir)
    with problems:
        check_same_model(cfg, run_dir)
    problems.raise_all()
    return shape, run_dir


def begin(cfg: PretrainConfig, shape: RunShape, run_dir: Path, ranks: Ranks) -> None:
    """The main rank, once the folder is its own: write config.yaml, and say what starts."""
    write_durably(run_dir / "config.yaml", cli.to_yaml(cfg).encode())
    log.logger.info("run %s: %s", run_dir, shape)
    if warning := placement_warning(ranks, tensor_parallel_size=shape.sizes.tensor):
        log.logger.warning(warning)


def check_folder(cfg: PretrainConfig, shape: RunShape, run_dir: Path) -> None:
    """Raise MachineError unless the run folder can be written and has room for its checkpoints."""
    from pipeline.planning.flops import num_parameters

    # The folder is made when the run begins; what is there already must take a file, which gets no
    # name, or loses it at once.
    there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise MachineError(
            f"the run folder {run_dir} cannot be written ({error.strerror}). "
            "Choose another with runs_dir=... or name=..."
        ) from None
    size = CHECKPOINT_BYTES_PER_PARAMETER * num_parameters(cfg.model, shape.vocab_size)
    free = shutil.disk_usage(there).free
    if free < 2 * size:  # the newest checkpoint and the one being written
        raise MachineError(
            f"the disk of {run_dir} has {free / 2**30:.2f} GiB free; two checkpoints of this model "
            f"need {2 * size / 2**30:.2f} GiB. "
            "Free some space or choose another disk with runs_dir=..."
        )


def check_same_model(cfg: PretrainConfig, run_dir: Path) -> None:
    """Raise CheckpointError where the run folder holds a run of another model."""
    from pipeline.checkpoint import folder as folders
    from pipeline.checkpoint.record import RETIRED

    records = (
        _record_if_whole(path)
        for _, path in reversed(folders.list_checkpoints(run_dir / "checkpoints"))
    )
    newest = next((record for record in records if record), None)
    if newest is None or not cfg.checkpoint.resume:
        return
    saved, now = newest.config["model"], cli.to_dict(cfg)["model"]
    free = {"name", "compile", "hidden_dropout", "attention_dropout", *RETIRED}
    changed = [
        f"model.{key}: {saved[key]} there, {now[key]} here"
        for key in saved
        if key not in free and saved[key] != now.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"{run_dir} holds a run of another model ({'; '.join(changed)}). "
            "Give this run another name=..., or delete that folder."
        )


def _record_if_whole(path: Path) -> CheckpointRecord | None:
    from pipeline.checkpoint.record import read_record

    try:
        return read_record(path)
    except CheckpointError:
        return None  # restore reports it and takes the one before
