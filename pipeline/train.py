"""Train a GPT.

    python -m pipeline.train model=gpt2-124m data.path=OUT          one process
    launch/local.sh 4 parallel.tensor_parallel_size=2 ...           4 processes on this machine
    sbatch launch/pretrain.slurm model=gpt3-6.7b ...                a cluster

The run lives in runs/<name>/; the same command continues it at the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pipeline import cli, log
from pipeline.config.pretrain import PretrainConfig
from pipeline.distributed.ranks import Ranks, ranks_from_environment
from pipeline.errors import EXIT_BUG
from pipeline.resilience import failure, notice
from pipeline.resilience.clock import Clock
from pipeline.training.startup import memory_advice, prepare


def main(cfg: PretrainConfig) -> int:
    """Train; among several ranks the first that fails speaks for all."""
    clock = Clock()
    notice.install_handlers()
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
        code = failure.report(
            error, ranks=ranks, run_dir=run_dir, step=clock.now.step, advice=advice
        )
        os._exit(code)  # tearing down groups whose other ranks are gone can wait for ever
    return 0


def train(cfg: PretrainConfig, ranks: Ranks, clock: Clock) -> None:
    """Check everything that needs no device, then connect, build, fit, tear down."""
    shape, run_dir = prepare(cfg, ranks)

    from pipeline.distributed.layout import connect, disconnect  # from here on torch is needed

    layout = connect(ranks, shape.sizes, timeout_s=cfg.resilience.collective_timeout_s)
    from pipeline.distributed.ranks import RankHost
    from pipeline.resilience import node_check
    from pipeline.resilience.watchdog import Watchdog
    from pipeline.training.trainer import Trainer

    clock.alive()
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
    with watchdog if timeout_s else contextlib.nullcontext():
        trainer = Trainer(cfg, shape, layout, run_dir=run_dir, clock=clock, hosts=hosts)
        try:
            trainer.fit()
        except Exception as error:
            trainer.metrics.close(getattr(error, "exit_code", EXIT_BUG))
            raise
    disconnect()


if __name__ == "__main__":
    cli.run(main, PretrainConfig, config="pretrain")
