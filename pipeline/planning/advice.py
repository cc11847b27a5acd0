"""Which single settings would make a run fit the device, the fastest first.

Takes whole settings: a change is offered where every rule of a run lets it. Printed by the plan,
and when a run is out of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipeline.config.choices import Recompute
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape
from pipeline.planning.devices import Device, load_device
from pipeline.planning.job import Job
from pipeline.planning.memory import GIB
from pipeline.planning.plan import Plan
from pipeline.planning.search import Layout, contexts, expert_sizes, legal_shape

MOST_CHANGES = 5
# Stands in for a device that is not known: neither its memory nor its speed is said then.
STAND_IN = "h100"


def advice(cfg: PretrainConfig, shape: RunShape, device: Device | None) -> str:
    """The breakdown, and what would lower it; lines for the log.

    Args:
        device: None where it is not known: then what saves memory is listed, least need first.
    """
    now = Plan(Job.of(cfg, shape), device or load_device(STAND_IN))
    lines = [f"estimated need of a device (stage {now.worst.stage}): {now.worst}"]
    if device is not None:
        found = fitting_changes(cfg, shape, now)
        if found:
            lines.append(f"single settings with which it fits {device.name}, fastest first:")
        else:
            lines.append(
                f"no single setting makes it fit {device.name}; python -m pipeline.plan "
                f"search=true world_size={shape.world_size} device={device.name} ... ranks layouts"
            )
    else:
        found = lower_changes(cfg, shape, now)
        lines += ["settings that lower it:"] if found else []
    best: dict[str, Layout] = {}  # of each setting, or the sizes of one would be all that is told
    for layout in found:
        best.setdefault(layout.settings.partition("=")[0], layout)
    for layout in list(best.values())[:MOST_CHANGES]:
        speed = f", {layout.plan.tokens_per_s / now.tokens_per_s - 1:+.0%} tokens/s"
        need = f"  {layout.settings}: {layout.plan.worst.total / GIB:.1f} GiB"
        lines.append(need + (speed if device is not None else ""))
    return "\n".join(lines)


def fitting_changes(cfg: PretrainConfig, shape: RunShape, now: Plan) -> list[Layout]:
    """The single changes with which the run fits the device, fastest first.

    They need less than `now`, which may fit by the count and have been out of memory all the same.
    """
    fitting = [
        layout
        for layout in _changes(cfg, shape, now.device)
        if layout.plan.fits and layout.plan.worst.tensors < now.worst.tensors
    ]
    return sorted(fitting, key=lambda layout: -layout.plan.tokens_per_s)


def lower_changes(cfg: PretrainConfig, shape: RunShape, now: Plan) -> list[Layout]:
    """The single changes that lower what tensors need by 3 % and more, least need first."""
    lower = [
        layout
        for layout in _changes(cfg, shape, now.device)
        if layout.plan.worst.tensors < 0.97 * now.worst.tensors
    ]
    return sorted(lower, key=lambda layout: layout.plan.worst.tensors)


def _changes(cfg: PretrainConfig, shape: RunShape, device: Device) -> Iterator[Layout]:
    """Single changes that are legal, as one writes them, with their plans."""
    training, parallel = cfg.training, cfg.parallel
    halves = (training.micro_batch_size // 2**n for n in range(1, 16))
    in_training: dict[str, dict[str, Any]] = {
        f"training.micro_batch_size={n}": {"micro_batch_size": n} for n in halves if n
    }
    if training.recompute is not Recompute.full:
        in_training["training.recompute=full"] = {"recompute": Recompute.full}
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    in_parallel: dict[str, dict[str, Any]] = {
        f"parallel.zero_stage={stage}": {"zero_stage": stage}
        for stage in (2, 3)
        if stage > shape.zero_stage
    }
    in_parallel["parallel.offload_optimizer=true"] = {"offload_optimizer": True}
    if tensor > 1 and not parallel.sequence_parallel:
        in_parallel["parallel.sequence_parallel=true"] = {"sequence_parallel": True}
    in_parallel[f"parallel.tensor_parallel_size={2 * tensor}"] = {
        "tensor_parallel_size": 2 * tensor
    }
    if 2 * (context := parallel.context_parallel_size) in contexts(cfg):
        in_parallel[f"parallel.context_parallel_size={2 * context}"] = {
            "context_parallel_size": 2 * context
        }
    experts = expert_sizes(cfg.model, tensor=tensor, ranks=shape.world_size // pipeline)
    in_parallel |= {
        f"parallel.expert_parallel_size={n}": {"expert_parallel_size": n}
        for n in experts
        if n > parallel.expert_parallel_size
    }
    in_parallel[f"parallel.pipeline_parallel_size={2 * pipeline}"] = {
        "pipeline_parallel_size": 2 * pipeline
    }
    changes = [
        (name, replace(cfg, training=replace(training, **change)))
        for name, change in in_training.items()
    ] + [
        (name, replace(cfg, parallel=replace(parallel, **change)))
        for name, change in in_parallel.items()
    ]
    for name, changed in changes:
        found = legal_shape(changed, world_size=shape.world_size, vocab_size=shape.vocab_size)
        if found is not None:
            yield Layout(name, Plan(Job.of(changed, found), device))
