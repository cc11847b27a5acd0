"""Train a GPT.

    python -m pipeline.train model=gpt2-124m data.path=OUT          one process
    launch/local.sh 4 parallel.tensor_parallel_size=2 ...           4 processes on this machine
    sbatch launch/pretrain.slurm model=gpt3-6.7b ...                a cluster

The run lives in runs/<name>/; the same command continues it at the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from pipeline import cli, failure, log, preemption
from pipeline.config import PretrainConfig
from pipeline.distributed import Ranks, placement_warning, ranks_from_environment
from pipeline.errors import EXIT_BUG, CheckpointError, EnvironmentError_
from pipeline.goodput import Clock
from pipeline.run_shape import RunShape, derive

# fp32 weights and two moments in a checkpoint.
CHECKPOINT_BYTES_PER_PARAMETER = 12


def main(cfg: PretrainConfig) -> int:
    """Train; among several ranks the first that fails speaks for all."""
    clock = Clock()
    preemption.install_handlers()
    ranks = ranks_from_environment()
    log.setup(global_rank=ranks.global_rank)
    try:
        train(cfg, ranks, clock)
    except BaseException as error:
        out_of_memory = type(error).__name__ == "OutOfMemoryError"  # torch's
        if ranks.world_size == 1 and not out_of_memory:
            raise
        advice = memory_advice(cfg, ranks) if out_of_memory else ""
        run_dir = Path(cfg.runs_dir) / cfg.name
        code = failure.report(error, ranks=ranks, run_dir=run_dir, step=clock.now.step, advice=advice)
        os._exit(code)  # tearing down groups whose other ranks are gone can wait for ever
    return 0


def train(cfg: PretrainConfig, ranks: Ranks, clock: Clock) -> None:
    """Check everything that needs no device, then connect, build, fit, tear down."""
    run, run_dir = prepare(cfg, ranks)

    from pipeline import distributed  # from here on torch is needed

    layout = distributed.connect(
        ranks,
        tensor_parallel_size=run.tensor_parallel_size,
        pipeline_parallel_size=run.pipeline_parallel_size,
        timeout_s=cfg.resilience.collective_timeout_s,
    )
    from pipeline import node_check
    from pipeline.trainer import Trainer
    from pipeline.watchdog import RankFact, Watchdog

    clock.alive()
    members = node_check.check(RankFact(ranks.global_rank, ranks.node, os.getpid(), clock.started_at), layout.device)
    timeout_s = cfg.resilience.hang_timeout_s
    watchdog = Watchdog(clock, run_dir=run_dir, ranks=members, global_rank=ranks.global_rank, timeout_s=timeout_s)
    with watchdog if timeout_s else contextlib.nullcontext():
        trainer = Trainer(cfg, run, layout, run_dir=run_dir, clock=clock, members=members)
        watchdog.note = trainer.note
        try:
            trainer.fit()
        except Exception as error:
            trainer.metrics.close(getattr(error, "exit_code", EXIT_BUG))
            raise
    distributed.disconnect()


def memory_advice(cfg: PretrainConfig, ranks: Ranks) -> str:
    """What the device was asked to hold, and the settings that would lower it."""
    from pipeline import memory
    from pipeline.data.facts import describe

    vocab_size = describe(cfg.data).vocab_size
    return memory.advice(cfg, derive(cfg, world_size=ranks.world_size, tokenizer_vocab_size=vocab_size))


def prepare(cfg: PretrainConfig, ranks: Ranks) -> tuple[RunShape, Path]:
    """The run's numbers and its folder, after every check that costs no device time.

    Raises:
        PipelineError: settings, data, folder or checkpoints do not fit together.
    """
    from pipeline.data.facts import describe

    facts = describe(cfg.data)
    run = derive(cfg, world_size=ranks.world_size, tokenizer_vocab_size=facts.vocab_size)
    run_dir = Path(cfg.runs_dir) / cfg.name
    check_folder(cfg, run, run_dir)
    check_same_model(cfg, run_dir)
    if ranks.is_main:
        (run_dir / "config.yaml").write_text(cli.to_yaml(cfg))
        log.logger.info("run %s: %s", run_dir, run)
        if warning := placement_warning(ranks, tensor_parallel_size=run.tensor_parallel_size):
            log.logger.warning(warning)
    return run, run_dir


def check_folder(cfg: PretrainConfig, run: RunShape, run_dir: Path) -> None:
    """Raise EnvironmentError_ unless the run folder can be written and has room for its checkpoints."""
    from pipeline.flops import num_parameters

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another rank may have been faster
    except OSError as error:
        raise EnvironmentError_(
            f"the run folder {run_dir} cannot be written ({error.strerror}). Choose another with runs_dir=... or "
            "name=..."
        ) from None
    size = CHECKPOINT_BYTES_PER_PARAMETER * num_parameters(cfg.model, run.vocab_size)
    free = shutil.disk_usage(run_dir).free
    if free < 2 * size:  # the newest checkpoint and the one being written
        raise EnvironmentError_(
            f"the disk of {run_dir} has {free / 2**30:.2f} GiB free; two checkpoints of this model need "
            f"{2 * size / 2**30:.2f} GiB. Free some space or choose another disk with runs_dir=..."
        )


def check_same_model(cfg: PretrainConfig, run_dir: Path) -> None:
    """Raise CheckpointError where the run folder holds a run of another model."""
    from pipeline import checkpoint_folder as folders

    records = (_record_if_whole(path) for _, path in reversed(folders.list_checkpoints(run_dir / "checkpoints")))
    newest = next((record for record in records if record), None)
    if newest is None or not cfg.checkpoint.resume:
        return
    saved, now = newest["config"]["model"], cli.to_dict(cfg)["model"]
    free = {"name", "compile", "backend", "hidden_dropout", "attention_dropout"}
    changed = [
        f"model.{key}: {saved[key]} there, {now[key]} here"
        for key in saved
        if key not in free and saved[key] != now.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"{run_dir} holds a run of another model ({'; '.join(changed)}). Give this run another name=..., or "
            "delete that folder."
        )


def _record_if_whole(path: Path) -> dict[str, Any] | None:
    from pipeline import checkpoint_folder as folders

    try:
        return folders.read_record(path)
    except CheckpointError:
        return None  # restore reports it and takes the one before


if __name__ == "__main__":
    cli.run(main, PretrainConfig, config="pretrain")
