"""Which settings would make a run fit the device: printed when it runs out of memory.

Takes whole settings: a change is offered where every rule of a run lets it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipeline.config.choices import Recompute
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape, derive
from pipeline.errors import ConfigError
from pipeline.planning import memory
from pipeline.planning.memory import Memory


def estimate_of_run(cfg: PretrainConfig, shape: RunShape) -> Memory:
    """What a run's first stage needs at its peak (memory.estimate)."""
    return memory.estimate(
        cfg.model,
        cfg.parallel,
        cfg.training,
        cfg.finetune,
        optimizer=cfg.optimizer.name,
        shape=shape,
    )


def advice(cfg: PretrainConfig, shape: RunShape) -> str:
    """The breakdown, and the settings that would lower it, best first; lines for the log."""
    now = estimate_of_run(cfg, shape)
    better = sorted(
        (
            (changed.total, change)
            for change, changed in _changes(cfg, shape)
            if changed.total < 0.97 * now.total
        )
    )
    ways = [f"  {change}: {total:.1f} GiB" for total, change in better[:5]]
    return "\n".join(
        [
            f"estimated need of a device: {now}",
            *(["settings that lower it:"] if ways else []),
            *ways,
        ]
    )


def _changes(cfg: PretrainConfig, shape: RunShape) -> Iterator[tuple[str, Memory]]:
    """(setting as one writes it, memory with it) for single changes that are legal."""
    training, parallel = cfg.training, cfg.parallel
    changes: list[tuple[str, PretrainConfig]] = [
        (
            f"training.micro_batch_size={n}",
            replace(cfg, training=replace(training, micro_batch_size=n)),
        )
        for n in {training.micro_batch_size // 2, 1}
        if 0 < n < training.micro_batch_size
    ]
    if training.recompute is not Recompute.full:
        changes.append(
            (
                "training.recompute=full",
                replace(cfg, training=replace(training, recompute=Recompute.full)),
            )
        )
    parallels: dict[str, dict[str, Any]] = {
        f"parallel.zero_stage={stage}": {"zero_stage": stage}
        for stage in (2, 3)
        if stage > shape.zero_stage
    }
    parallels["parallel.offload_optimizer=true"] = {"offload_optimizer": True}
    if parallel.tensor_parallel_size > 1:
        parallels["parallel.sequence_parallel=true"] = {"sequence_parallel": True}
    parallels[f"parallel.tensor_parallel_size={2 * parallel.tensor_parallel_size}"] = {
        "tensor_parallel_size": 2 * parallel.tensor_parallel_size
    }
    changes += [
        (name, replace(cfg, parallel=replace(parallel, **change)))
        for name, change in parallels.items()
    ]
    for name, changed in changes:
        try:
            changed_shape = derive(
                changed, world_size=shape.world_size, tokenizer_vocab_size=shape.vocab_size
            )
        except ConfigError:
            continue
        yield name, estimate_of_run(changed, changed_shape)
