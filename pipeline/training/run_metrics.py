"""The numbers of a run, wired from its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape
from pipeline.planning.devices import device_here
from pipeline.planning.flops import count_parameters, flops_per_token
from pipeline.planning.job import Job
from pipeline.planning.plan import Plan
from pipeline.resilience.bookkeeping import bookkeeping
from pipeline.resilience.clock import Clock
from pipeline.resilience.goodput import Goodput
from pipeline.tracking.metrics import Metrics


def open_metrics(
    cfg: PretrainConfig, shape: RunShape, run_dir: Path, *, clock: Clock, datasets: dict[str, Any]
) -> Metrics:
    """What tells of the run; for the rank that speaks.

    Args:
        cfg, shape, run_dir, clock: the run.
        datasets: identity to name, path and tokens, as the loader's state has them.
    """
    return Metrics(
        cfg.tracking,
        run_dir=run_dir,
        config=cli.to_dict(cfg),
        shape=shape,
        flops_per_token=flops_per_token(
            cfg.model,
            cfg.finetune,
            vocab_size=shape.vocab_size,
            seq_len=shape.seq_len,
            images_per_row=shape.images_per_row,
        ),
        goodput=Goodput(run_dir, clock),
        facts={
            **count_parameters(cfg.model, cfg.finetune, shape.vocab_size),
            "datasets": datasets,
        },
        plan=_plan(cfg, shape),
    )


def _plan(cfg: PretrainConfig, shape: RunShape) -> Plan | None:
    """Of this run on the device under it; None where conf/devices/ has none, or a broken file."""
    with bookkeeping("the plan of this run", errors=Exception):
        device = device_here()
        return Plan(Job.of(cfg, shape), device) if device else None
    return None
