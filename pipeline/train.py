"""Train a GPT.

    python -m pipeline.train model=gpt2-124m data.path=OUT          one process
    launch/local.sh 4 parallel.tensor_parallel_size=2 ...           4 processes on this machine
    sbatch launch/pretrain.slurm model=gpt3-6.7b ...                a cluster
    python -m pipeline.train --multirun ...                         a sweep (pipeline.sweep)

The run lives in runs/<name>/; the same command continues it at the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from pathlib import Path

from pipeline import cli, log
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape
from pipeline.distributed.ranks import Ranks, crowding_warning, ranks_from_environment
from pipeline.errors import EXIT_BUG
from pipeline.resilience import failure, notice
from pipeline.resilience.clock import Clock
from pipeline.training import startup


def main(cfg: PretrainConfig) -> int:
    """Train; among several ranks the first that fails speaks for all."""
    clock = Clock()
    ranks = ranks_from_environment()
    notice.install_handlers(speaks=ranks.is_main)
    log.setup(global_rank=ranks.global_rank)
    begun: Path | None = None  # the run's folder, once this start may write to it
    try:
        # Everything that needs no device; then the folder is this start's, or it is refused.
        start = startup.check(cfg, world_size=ranks.world_size)
        cfg, shape, run_dir = start.cfg, start.shape, start.run_dir
        speaks = ranks.is_main
        with startup.own(cfg, node=ranks.node) if speaks else contextlib.nullcontext():
            begun = run_dir
            if speaks:
                startup.begin(cfg, start, ranks)
            train(cfg, shape, ranks, run_dir=run_dir, clock=clock)
    except BaseException as error:
        out_of_memory = type(error).__name__ == "OutOfMemoryError"  # torch's
        if ranks.world_size == 1 and not out_of_memory:
            raise
        advice = startup.memory_advice(cfg, ranks) if out_of_memory else ""
        code = failure.report(error, ranks=ranks, run_dir=begun, step=clock.now.step, advice=advice)
        os._exit(code)  # tearing down groups whose other ranks are gone can wait for ever
    return 0


def train(
    cfg: PretrainConfig, shape: RunShape, ranks: Ranks, *, run_dir: Path, clock: Clock
) -> None:
    """Connect, build, fit, tear down."""
    log.logger.info("loading torch, megatron-core and DeepSpeed")
    from pipeline.distributed.layout import connect, disconnect  # from here on torch is needed

    layout = connect(ranks, shape.sizes, timeout_s=cfg.resilience.collective_timeout_s)
    from pipeline.distributed.ranks import RankHost
    from pipeline.resilience import node_check
    from pipeline.resilience.watchdog import Watchdog
    from pipeline.training.trainer import Trainer

    clock.alive()
    if layout.device.type == "cpu" and (crowded := crowding_warning(ranks)) and ranks.is_main:
        log.logger.warning(crowded)
    hosts = node_check.check(
        RankHost(ranks.global_rank, ranks.node, os.getpid(), clock.started_at), layout.device
    )
    trainer: Trainer | None = None
    timeout_s = cfg.resilience.hang_timeout_s
    watchdog = Watchdog(
        clock,
        run_dir=run_dir,
        hosts=hosts,
        global_rank=ranks.global_rank,
        timeout_s=timeout_s,
        describe_step=lambda: trainer.describe_step() if trainer else "It was still starting.",
    )
    exit_code = EXIT_BUG
    try:
        with watchdog if timeout_s else contextlib.nullcontext():
            trainer = Trainer(cfg, shape, layout, run_dir=run_dir, clock=clock, hosts=hosts)
            trainer.fit()
        exit_code = 0
    except Exception as error:
        exit_code = getattr(error, "exit_code", EXIT_BUG)
        raise
    finally:
        # Nobody watches any more: all is on the disk, and W&B may take its time, a minute at most.
        if trainer is not None:
            trainer.metrics.close(exit_code)
    disconnect()


if __name__ == "__main__":
    if "--multirun" in sys.argv:  # Hydra's spelling of another command
        sys.argv.remove("--multirun")
        runpy.run_module("pipeline.sweep", run_name="__main__")
    cli.run(main, PretrainConfig, config="pretrain")
