"""The gradients of DeepSpeed's ZeRO-1 in fp32, summed and reduced where the update reads them.

DeepSpeed copies every gradient into a bucket, each owner's part of that into another tensor, the
reduced part back, to a partition, and all parts into one flat gradient; without streams, as on a
CPU, nothing of it beside the backward pass. Here a step's first gradient of a parameter is written
to its place in the flat gradient of its group, which the parameter's `grad` is from then on, and
reduction.py reduces it there to the rank whose part it is. benchmarks/parallel.py: 6 % of a step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup
from torch import Tensor, nn

from pipeline.engine.deepspeed.reduction import FlatSums, Reduction
from pipeline.patching import replace


def flat_sums(optimizer: Any) -> list[FlatSums]:
    """Room for the gradients of a DeepSpeedZeroOptimizer, as its flat weights lie."""
    return [
        FlatSums(torch.zeros_like(flat), members, copies)
        for flat, members, copies in zip(
            optimizer.bit16_groups_flat,
            optimizer.round_robin_bit16_groups,
            optimizer.real_dp_process_group,
            strict=True,
        )
    ]


def sum_in_place(optimizer: Any, sums: list[FlatSums], reduction: Reduction) -> None:
    """Change `optimizer`, a DeepSpeedZeroOptimizer of stage 1 and fp32 under the plain engine.

    Args:
        sums: where the gradients are to be, by parameter group.
        reduction: of `sums` to their owners.
    """
    views = {id(parameter): view for each in sums for parameter, view in _views(each)}
    owned = [_owned(each) for each in sums]

    def take(parameter: nn.Parameter, _: int) -> None:
        view, gradient = views[id(parameter)], parameter.grad
        if gradient is not None and gradient is not view:  # autograd adds later ones to the view
            parameter.grad = view.copy_(gradient)
        if optimizer.is_gradient_accumulation_boundary():
            reduction.arrived(parameter)

    def finish(**_: Any) -> None:
        for each in sums:
            for parameter in each.members:
                if parameter.grad is None:  # a step passed it by: there lies the last one's
                    views[id(parameter)].zero_()
                parameter.grad = None
        reduction.finish()
        for i, (flat, parts) in enumerate(owned):
            optimizer.averaged_gradients[i] = GradPartitionBufferGroup(parts, flat)

    change = partial(
        replace,
        optimizer,
        why="copies gradients four times, and on a CPU reduces them after the backward pass",
        upstream="not reported",
        proof="tests/engine/deepspeed/test_fp32_sums.py::"
        "test_losses_and_norms_are_deepspeeds_own[all used]",
    )
    change("process_gradients", take)
    change("reduce_gradients", finish)


def _views(sums: FlatSums) -> list[tuple[nn.Parameter, Tensor]]:
    """Each parameter with its place."""
    sizes = [member.numel() for member in sums.members]
    runs = sums.flat[: sum(sizes)].split(sizes)
    return [(member, run.view_as(member)) for member, run in zip(sums.members, runs, strict=True)]


def _owned(sums: FlatSums) -> tuple[Tensor, list[Tensor]]:
    """This rank's part of the flat sums, and in it the run of each parameter that has one."""
    size = sums.flat.numel() // sums.copies.size()
    begin = dist.get_rank(sums.copies) * size
    runs, start = [], 0
    for member in sums.members:
        stop = start + member.numel()
        if (first := max(start, begin)) < (last := min(stop, begin + size)):
            runs.append(sums.flat[first:last])
        start = stop
    return sums.flat[begin : begin + size], runs
