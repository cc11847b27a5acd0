"""The fp32 gradient sums of DeepSpeed's BF16_Optimizer, reduced while the backward pass runs.

DeepSpeed clears the sums twice a step, turns each bf16 gradient into an fp32 copy before it adds
it, and reduces them after the backward pass, through a copy. Here the first gradient of a step is
written over the old sum and later ones are added as they are; a sum is cleared only where a
parameter got no gradient (a part of the model that a step passed by); and in the last micro-batch
sums are reduced as reduction.py does it. The numbers are the same;
benchmarks/train_step.py: 2 % of a step of 124 M parameters, on one rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from pipeline.engine.deepspeed.reduction import FlatSums, Reduction
from pipeline.patching import replace


def flat_sums(optimizer: Any) -> list[FlatSums]:
    """The fp32 sums of a BF16_Optimizer."""
    return [
        FlatSums(*group)
        for group in zip(
            optimizer.fp32_groups_gradients_flat,
            optimizer.bf16_groups,
            optimizer.real_dp_process_group,
            strict=True,
        )
    ]


def sum_in_place(optimizer: Any, reduction: Reduction | None) -> None:
    """Change `optimizer`, a BF16_Optimizer with immediate_grad_update under the plain engine.

    Args:
        reduction: over the data-parallel ranks; None: there is one rank.
    """

    def add(parameter: Tensor, group: int, index: int, clear_lp_grads: bool) -> None:
        if parameter.grad is None:
            return
        total = optimizer.fp32_groups_gradients[group][index].data
        gradient = parameter.grad.data.view(total.shape)
        has_gradient = optimizer.fp32_groups_has_gradients[group]
        if has_gradient[index]:
            total.add_(gradient)
        else:
            total.copy_(gradient)
        has_gradient[index] = True
        if reduction and optimizer.is_gradient_accumulation_boundary():
            reduction.arrived(optimizer.bf16_groups[group][index])

    def forget() -> None:
        for has_gradient in optimizer.fp32_groups_has_gradients:
            has_gradient[:] = [False] * len(has_gradient)

    def clear_what_is_left(**_: Any) -> None:
        for totals, has_gradient in zip(
            optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients
        ):
            for index, has in enumerate(has_gradient):
                if not has:
                    totals[index].zero_()
                    has_gradient[index] = True

    change = partial(replace, optimizer, upstream="not reported")
    change(
        "_update_hp_grad",
        add,
        why="makes an fp32 copy of each gradient, and reduces nothing before the last one",
        proof="tests/engine/deepspeed/test_bf16_sums.py::"
        "test_gradients_are_reduced_while_the_backward_pass_goes_on",
    )
    change(
        "clear_hp_grads",
        forget,
        why="clears all sums, which the next step's first gradients overwrite",
        proof="tests/engine/deepspeed/test_bf16_sums.py::test_one_rank_copies_no_gradients",
    )
    change(
        "backward_epilogue",
        clear_what_is_left,
        why="does not know that a sum without a gradient still holds the last step's",
        proof="tests/engine/deepspeed/test_bf16_sums.py::"
        "test_losses_and_norms_are_deepspeeds_own[a layer passed by]",
    )
