"""Where DeepSpeed keeps the fp32 weights; its attribute names here are those of 0.19."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.engine.runner import Slot


def find_slots(wrapper: Any, parameters: list[nn.Parameter]) -> Iterator[Slot]:
    """The slots of this rank's trained parameters.

    Args:
        wrapper: DeepSpeed's optimizer of any stage; torch's own at ZeRO-0.
        parameters: of the model.
    """
    for flat, group in find_flats(wrapper, parameters):
        if isinstance(wrapper, torch.optim.Optimizer):
            yield Slot(group[0], flat, 0, 0, flat.numel())
        elif _is_stage_3(wrapper):
            yield from _stage_3_slots(flat, group)
        else:
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:  # None: no element of it is updated here
                    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                    yield Slot(parameter, flat, here.start, there.start, here.numel)


def find_flats(wrapper: Any, parameters: list[nn.Parameter]) -> list[tuple[Any, list[Any]]]:
    """The flat tensors that the optimizer knows, with the parameters each is cut from.

    At ZeRO-0 a parameter is its own; else a group of parameters has one, at stage 3 several.
    """
    if isinstance(wrapper, torch.optim.Optimizer):
        return [(parameter, [parameter]) for parameter in parameters if parameter.requires_grad]
    if _is_stage_3(wrapper):
        groups, flats = wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat
    elif hasattr(wrapper, "bf16_groups"):
        groups, flats = wrapper.bf16_groups, wrapper.fp32_groups_flat_partition
    else:
        groups, flats = wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups
    return list(zip(flats, groups, strict=True))


def _stage_3_slots(flat: Any, group: list[Any]) -> Iterator[Slot]:
    """Each parameter is cut into equal parts, the last one padded."""
    offset = 0
    for parameter in group:
        start, stop = _stage_3_run(parameter)
        if start < stop:
            yield Slot(parameter, flat, offset, start, stop - start)
        offset += parameter.partition_numel()


def _stage_3_run(parameter: Any) -> tuple[int, int]:
    """First and last element of this rank's part of a partitioned parameter."""
    width = parameter.partition_numel()
    start = min(dist.get_rank(parameter.ds_process_group) * width, parameter.ds_numel)
    return start, min(start + width, parameter.ds_numel)


def find_frozen_slots(parameters: list[nn.Parameter]) -> Iterator[Slot]:
    """The slots of the parameters that no optimizer knows, whatever the ZeRO stage."""
    for parameter in parameters:
        if parameter.requires_grad:
            continue
        if not hasattr(parameter, "ds_tensor"):
            yield Slot(parameter, parameter.data.view(-1), 0, 0, parameter.numel())
            continue
        start, stop = _stage_3_run(parameter)
        if start < stop:
            held = parameter.ds_tensor.data.view(-1)[: stop - start]
            yield Slot(parameter, held, 0, start, stop - start)


def publish_weights(wrapper: Any) -> None:
    """Copy the fp32 weights into those that the model computes with.

    Collective over data-parallel ranks.
    """
    if isinstance(wrapper, torch.optim.Optimizer):
        return
    if not _is_stage_3(wrapper):
        wrapper.update_lp_params()
        return
    for i, flat in enumerate(wrapper.fp32_partitioned_groups_flat):
        wrapper.fp16_partitioned_groups_flat[i].data.copy_(flat.data)
        pieces = wrapper.unflatten(
            wrapper.fp16_partitioned_groups_flat[i], wrapper.fp16_partitioned_groups[i]
        )
        for held, piece in zip(wrapper.fp16_partitioned_groups[i], pieces, strict=True):
            held.data = piece
    if persistent := wrapper.persistent_parameters:  # small ones that stay whole on every rank
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def _is_stage_3(wrapper: Any) -> bool:
    return hasattr(wrapper, "fp32_partitioned_groups_flat")
