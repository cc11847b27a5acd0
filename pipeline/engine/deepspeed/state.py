"""Where DeepSpeed keeps fp32 weights and optimizer state, as views under layout-free names.

    fragments(engine) -> [Fragment(name, start, {"weight": view, "exp_avg": view, ...})]

A checkpoint is written from these views and read into them; nothing is gathered. Loading is
`create_state`, writing into the views, then `publish_weights`, which hands the fp32 weights to the
copies that forward and backward use. Alike for every ZeRO stage and for pipelines; DeepSpeed's
attribute names are those of 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.engine.deepspeed.changes import HostAdam
from pipeline.engine.engine import Engine
from pipeline.model.fragments import WEIGHT, Fragment
from pipeline.model.partition import Partition


@dataclass(frozen=True)
class _Slot:
    """A fragment's place in the flat fp32 tensor that the optimizer knows."""

    parameter: nn.Parameter
    flat: Tensor
    offset: int
    start: int
    numel: int


def fragments(engine: Engine) -> list[Fragment]:
    """Views of what this rank holds of weights and optimizer state, tied copies included."""
    named = {
        id(parameter): (name, partition)
        for name, (parameter, partition) in engine.all_parameters().items()
    }
    state = engine.optimizer.state
    found = []
    for index, slot in enumerate(_slots(engine)):
        name, partition = named[id(slot.parameter)]
        views = {WEIGHT: slot.flat.data.view(-1).narrow(0, slot.offset, slot.numel)}
        for key, value in state.get(slot.flat, {}).items():
            if isinstance(value, Tensor) and value.numel() == slot.flat.numel() and value.dim() > 0:
                views[key] = value.view(-1).narrow(0, slot.offset, slot.numel)
        found.append(
            Fragment(name, partition, slot.start, views, _is_owned(engine, slot, partition, index))
        )
    return found


def _is_owned(engine: Engine, slot: _Slot, partition: Partition, index: int) -> bool:
    if getattr(slot.parameter, "ds_pipe_replicated", False):
        return False
    if not partition.is_split and engine.layout.tensor.rank:
        return False
    # ZeRO-0: every data-parallel rank holds everything, so they take turns. Otherwise each holds
    # runs of its own.
    return not engine.is_unsharded or index % engine.layout.data.size == engine.layout.data.rank


def create_state(engine: Engine, keys: list[str], *, optimizer_step: int) -> None:
    """Give a fresh optimizer its step count, and zero state under `keys`.

    It would create them at its first step, which is too late to read a checkpoint into.
    """
    optimizer = engine.optimizer
    for flat in {id(slot.flat): slot.flat for slot in _slots(engine)}.values():
        state = optimizer.state[flat]
        for key in keys:
            if key not in state:
                state[key] = torch.zeros_like(flat.data)
        state["step"] = _step_count(optimizer, flat, optimizer_step)


def optimizer_step(engine: Engine) -> int:
    """Updates the optimizer has applied: steps without the skipped ones."""
    counts = [int(state["step"]) for state in engine.optimizer.state.values() if "step" in state]
    return max(counts, default=0)


@torch.no_grad()
def publish_weights(engine: Engine) -> None:
    """Copy the views' fp32 weights into those that the model computes with.

    Collective over data-parallel ranks.
    """
    optimizer = engine.deepspeed.optimizer
    if engine.is_unsharded:
        return
    if not _is_stage_3(optimizer):
        optimizer.update_lp_params()
        return
    for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        optimizer.fp16_partitioned_groups_flat[i].data.copy_(flat.data)
        pieces = optimizer.unflatten(
            optimizer.fp16_partitioned_groups_flat[i], optimizer.fp16_partitioned_groups[i]
        )
        for held, piece in zip(optimizer.fp16_partitioned_groups[i], pieces, strict=True):
            held.data = piece
    # Small parameters that stay whole on every rank.
    if persistent := optimizer.persistent_parameters:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def _is_stage_3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _step_count(optimizer: Any, flat: Tensor, count: int) -> Any:
    if isinstance(optimizer, HostAdam):
        return count
    is_on_device = any(
        group.get("fused") or group.get("capturable") for group in optimizer.param_groups
    )
    return torch.tensor(float(count), device=flat.device if is_on_device else "cpu")


def _slots(engine: Engine) -> Iterator[_Slot]:
    optimizer = engine.deepspeed.optimizer
    if engine.is_unsharded:
        for parameter, _ in engine.all_parameters().values():
            yield _Slot(parameter, parameter, 0, 0, parameter.numel())
    elif _is_stage_3(optimizer):
        yield from _stage_3_slots(optimizer)
    else:
        is_bf16 = hasattr(optimizer, "bf16_groups")
        groups = optimizer.bf16_groups if is_bf16 else optimizer.bit16_groups
        flats = (
            optimizer.fp32_groups_flat_partition
            if is_bf16
            else optimizer.single_partition_of_fp32_groups
        )
        for group, flat in zip(groups, flats, strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:  # None: no element of it is updated here
                    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                    yield _Slot(parameter, flat, here.start, there.start, here.numel)


def _stage_3_slots(optimizer: Any) -> Iterator[_Slot]:
    """Each parameter is cut into equal parts, the last one padded."""
    for group, flat in zip(
        optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True
    ):
        offset = 0
        for parameter in group:
            rank, width = dist.get_rank(parameter.ds_process_group), parameter.partition_numel()
            start = min(rank * width, parameter.ds_numel)
            stop = min(start + width, parameter.ds_numel)
            if start < stop:
                yield _Slot(parameter, flat, offset, start, stop - start)
            offset += width
