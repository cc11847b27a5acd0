"""Whether a run may begin, or go on, in its folder: what its checkpoints say.

    run folder --newest readable record--> model, optimizer, total_steps
               --no checkpoint--> init_from

Restoring would meet each of these too, minutes later on every rank, with config.yaml overwritten
and a W&B run open. Nothing is written here, no tensor is read, and torch is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import cli
from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.adapters import Base, base_of, find_base, recorded_base
from pipeline.checkpoint.record import RETIRED, CheckpointRecord, read_record
from pipeline.config.choices import Position
from pipeline.config.parameter_names import freezes
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape
from pipeline.config.same_model import ROTARY, another_model, differing
from pipeline.config.upcycling import dense_model
from pipeline.errors import CheckpointError, ConfigError, Problems
from pipeline.log import logger

if TYPE_CHECKING:
    from pipeline.config.model import ModelConfig

# Model settings that may differ between two starts: they change no parameter and no loss.
FREE = {"name", "compile", "hidden_dropout", "attention_dropout", *RETIRED}


def check(cfg: PretrainConfig, shape: RunShape, run_dir: Path) -> None:
    """Raise PipelineError, with all that is wrong, unless the run may begin or go on in `run_dir`.

    Args:
        cfg, shape: the run.
        run_dir: runs/NAME; need not exist.
    """
    if freezes(cfg.model, cfg.finetune) and not cfg.checkpoint.init_from:
        raise ConfigError(
            f"finetune.train ({', '.join(cfg.finetune.train)}) leaves parameters frozen, and "
            "frozen at random numbers they are of no use. Set checkpoint.init_from to a run, a "
            "checkpoint or a Hugging Face folder, at every start of this run."
        )
    if cfg.checkpoint.init_adapter and not cfg.checkpoint.init_from:
        raise ConfigError(
            "checkpoint.init_adapter is the start of matrices beside a base, and there is none. "
            "Set checkpoint.init_from to the folder of the model that the adapter belongs to."
        )
    if cfg.checkpoint.init_tower and not cfg.model.vision.num_layers:
        raise ConfigError(
            "checkpoint.init_tower is the start of a picture encoder, and model.vision.num_layers "
            "is 0: there is none. Set model.vision to the tower's sizes (docs/pictures.md)."
        )
    if cfg.checkpoint.init_tower and cfg.checkpoint.init_from:
        raise ConfigError(
            "checkpoint.init_from brings an encoder, and checkpoint.init_tower another: leave one "
            "out. A text model and a tower become one folder with pipeline.hf_import tower=..."
        )
    places = folders.places(run_dir, cfg.checkpoint.fallback_dir)
    checkpoints = folders.list_places(places)
    if not checkpoints:
        _check_beginning(cfg, shape, run_dir, places)
        return
    if not cfg.checkpoint.resume:
        raise CheckpointError(
            f"{checkpoints[-1][1].parent} holds checkpoints up to step {checkpoints[-1][0]}, and "
            "checkpoint.resume=false would begin at step 0 among them. "
            "Give the new run another name=..., or move that folder away."
        )
    if (record := newest_record(places)) is None:
        return  # restore reads every byte, says what is damaged, and ends the run
    problems = Problems()
    problems.found += _differences(cfg, shape, run_dir, record)
    problems.raise_all()


def newest_record(places: Sequence[Path]) -> CheckpointRecord | None:
    """Of the newest checkpoint in these folders whose record is undamaged; None: there is none."""
    paths = reversed(folders.list_places(places))
    return next((record for _, path in paths if (record := folders.whole_record(path))), None)


def _check_beginning(
    cfg: PretrainConfig, shape: RunShape, run_dir: Path, places: Sequence[Path]
) -> None:
    """No checkpoint: damaged ones are not passed over, and what it starts from must be usable."""
    if damaged := sorted(p.name for place in places for p in place.glob("damaged-step-*")):
        raise CheckpointError(
            f"{run_dir} holds only damaged checkpoints ({', '.join(damaged[-3:])}): a start would "
            "begin at step 0. "
            "Repair one and rename it back, or begin again under another name=..."
        )
    if cfg.checkpoint.init_from:
        model = dense_model(cfg.model) if cfg.checkpoint.upcycle else cfg.model
        _check_initial_weights(Path(cfg.checkpoint.init_from), model, shape.vocab_size)
    if cfg.checkpoint.init_tower:
        from pipeline.huggingface.tower import Tower

        Tower(Path(cfg.checkpoint.init_tower)).check(cfg.model)
    if cfg.checkpoint.init_adapter:
        from pipeline.huggingface.peft_reader import PeftMatrices

        model = replace(cfg.model, vocab_size=shape.vocab_size)
        PeftMatrices(Path(cfg.checkpoint.init_adapter), model, cfg.finetune)


def _check_initial_weights(path: Path, model: ModelConfig, vocab_size: int) -> None:
    """Raise CheckpointError unless the folder's weights compute in this model what they did.

    All that its config and the names of its tensors tell; their values are the ranks' work.
    """
    from pipeline.huggingface.mapping import mapping_for
    from pipeline.huggingface.settings import read_model_config
    from pipeline.huggingface.tensor_files import check_tensors

    ours = replace(model, vocab_size=vocab_size)
    if (path / "config.json").is_file():
        theirs = read_model_config(path)
        _check_same_model(path, theirs, ours)
        check_tensors(path, mapping_for(theirs))
        return
    try:
        path = folders.find(path)
    except CheckpointError:
        return  # the check of the tokenizer looks for the folder too, and says what is wrong
    record = read_record(path)
    _check_same_model(path, record.model(), ours)
    if (base := recorded_base(record)) is not None:
        find_base(base)


def _check_same_model(path: Path, theirs: ModelConfig, ours: ModelConfig) -> None:
    """Raise CheckpointError where two models compute otherwise, or their tables do not fit.

    A checkpoint's positions may be stretched on purpose, to go on with longer sequences: those are
    named. Of a Hugging Face folder it is said how long its sequences were; of its tables, rows that
    are too many are left out.
    """
    differ, is_foreign = differing(theirs, ours), (path / "config.json").is_file()
    if not is_foreign and (stretched := [key for key in differ if key in ROTARY]):
        values = (f"{key} ({getattr(theirs, key)} there)" for key in stretched)
        logger.warning("%s was trained with another model.%s", path, ", ".join(values))
        differ = [key for key in differ if key not in ROTARY]
    tables = ["vocab_size"] + ["max_seq_len"] * (ours.position is Position.learned)
    for key in tables:
        there, here = getattr(theirs, key), getattr(ours, key)
        if here > there or here != there and not is_foreign:
            differ.append(key)
    if differ:
        is_dense = ours.moe.num_experts and not theirs.moe.num_experts
        hint = ". To begin with copies of its MLPs as experts, set checkpoint.upcycle=true"
        raise CheckpointError(another_model(path, theirs, differ) + (hint if is_dense else ""))


def _differences(
    cfg: PretrainConfig, shape: RunShape, run_dir: Path, record: CheckpointRecord
) -> Iterator[ConfigError | CheckpointError]:
    """What the settings say otherwise than the newest checkpoint."""
    saved, now = record.config.get("model", {}), cli.to_dict(cfg)["model"]
    changed = [
        f"model.{key}: {saved[key]} there, {now.get(key)} here"
        for key in saved
        if key not in FREE and saved[key] != now.get(key)
    ]
    if changed:
        yield CheckpointError(
            f"{run_dir} holds a run of another model ({'; '.join(changed)}). "
            "Give this run another name=..., or move that folder away."
        )
    before, after = record.finetune(), cfg.finetune
    wrong = [
        f"finetune.{key}: {value} there, {getattr(after, key)} here"
        for key, value in vars(before).items()
        if value != getattr(after, key)
    ]
    if wrong:
        yield CheckpointError(
            f"{run_dir} trains other parameters ({'; '.join(wrong)}). Give this run another "
            f"name=..., with checkpoint.init_from={run_dir} to start from what that one learned."
        )
    elif (base := recorded_base(record)) is not None and cfg.checkpoint.init_from:
        yield from _another_base(base, Path(cfg.checkpoint.init_from))
    if record.optimizer != cfg.optimizer.name.name:
        yield CheckpointError(
            f"{run_dir} was trained with optimizer.name={record.optimizer}, this start has "
            f"{cfg.optimizer.name.name}: its optimizer state does not fit. To go on with the "
            "weights only, give another name=... and checkpoint.init_from=..."
        )
    if shape.total_steps < record.step:
        yield ConfigError(
            f"{run_dir} has done {record.step} steps, and training.total_steps is "
            f"{shape.total_steps}: there is nothing left to train. "
            f"Set training.total_steps above {record.step}, or begin again under another name=..."
        )


def _another_base(base: Base, path: Path) -> Iterator[CheckpointError]:
    """What is wrong with the weights a run would go on beside.

    A Hugging Face folder is compared when it is loaded: reading all of it is the ranks' work.
    """
    try:
        if not (path / "config.json").is_file():
            base.check(base_of(folders.find(path)))
    except CheckpointError as error:
        yield error
