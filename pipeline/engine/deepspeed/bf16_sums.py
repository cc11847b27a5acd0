"""The fp32 gradient sums of DeepSpeed's BF16_Optimizer, reduced while the backward pass runs.

DeepSpeed clears the sums twice a step, turns each bf16 gradient into an fp32 copy before it adds
it, and reduces them after the backward pass, through a copy. Here the first gradient of a step is
written over the old sum and later ones are added as they are; a sum is cleared only where a
parameter got no gradient (a part of the model that a step passed by); and in the last micro-batch a
bucket of sums is reduced in place as soon as its last gradient is there. The numbers are the same;
benchmarks/train_step.py: 2 % of a step of 124 M parameters, on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from pipeline.patching import replace

# Gradients of one reduction, Megatron-LM's default: small enough to start early, large enough to
# fill a link.
BUCKET_ELEMENTS = 40_000_000


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
            reduction.arrived(group, index)

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


@dataclass
class _Bucket:
    sums: Tensor
    """A run of a group's flat sums."""
    num_members: int
    first: int
    """Position in the model of its first parameter, whose gradient comes last."""
    num_missing: int
    copies: dist.ProcessGroup
    """Ranks that hold the same parameters: all data-parallel ones, or fewer of experts."""

    def take_one(self) -> None:
        """One more gradient is there."""
        self.num_missing -= 1

    def empty(self) -> None:
        """All gradients are missing again."""
        self.num_missing = self.num_members


class Reduction:
    """Means of the gradient sums over data-parallel ranks, in buckets, the last layers' first.

    Every rank launches the buckets in the same order, whichever gradient is missing where.
    """

    def __init__(
        self, optimizer: Any, group: dist.ProcessGroup, parameters: list[nn.Parameter]
    ) -> None:
        """Cut the sums of `optimizer` into buckets.

        Args:
            group: the data-parallel ranks.
            parameters: of the model, in the order of the forward pass.
        """
        place = {id(parameter): i for i, parameter in enumerate(parameters)}
        self.group = group
        # NCCL divides on the way, by the size of the bucket's own group; gloo does not.
        self.can_average = optimizer.fp32_groups_gradients_flat[0].is_cuda
        self._bucket_of: dict[tuple[int, int], _Bucket] = {}
        for i, members in enumerate(optimizer.bf16_groups):
            copies = optimizer.real_dp_process_group[i]
            copies = group if copies.size() == group.size() else copies
            self._cut(i, members, optimizer.fp32_groups_gradients_flat[i], place, copies)
        unique = {id(bucket): bucket for bucket in self._bucket_of.values()}
        self.buckets = sorted(unique.values(), key=lambda bucket: -bucket.first)
        self._reset()

    def _cut(
        self,
        group: int,
        members: list[Any],
        flat: Tensor,
        place: dict[int, int],
        copies: dist.ProcessGroup,
    ) -> None:
        """Cut a group's flat sum into buckets from its end: the last layers are ready first."""
        stop = end = sum(member.numel() for member in members)
        indices: list[int] = []
        for index in reversed(range(len(members))):
            indices.append(index)
            end -= members[index].numel()
            if stop - end >= BUCKET_ELEMENTS or index == 0:
                first = min(place[id(members[i])] for i in indices)
                count = len(indices)
                bucket = _Bucket(flat[end:stop], count, first, count, copies)
                self._bucket_of |= {(group, i): bucket for i in indices}
                stop, indices = end, []

    def arrived(self, group: int, index: int) -> None:
        """A parameter's last gradient of a step is in its sum. Collective if a bucket is full."""
        self._bucket_of[group, index].take_one()
        while self._next < len(self.buckets) and self.buckets[self._next].num_missing == 0:
            self._launch()

    def finish(self) -> None:
        """All sums are means. Collective: call on every data-parallel rank."""
        while self._next < len(self.buckets):
            self._launch()
        for work, bucket in zip(self._works, self.buckets, strict=True):
            work.wait()
            # Of an expert's tokens each of its copies has seen its own: those of all data-parallel
            # ranks in the end, by whose number a mean divides.
            if not self._averages(bucket):
                bucket.sums.mul_(1.0 / self.group.size())
        self._reset()

    def _averages(self, bucket: _Bucket) -> bool:
        """Whether the reduction of a bucket divides by the number of data-parallel ranks."""
        return self.can_average and bucket.copies is self.group

    def _launch(self) -> None:
        bucket = self.buckets[self._next]
        operation = dist.ReduceOp.AVG if self._averages(bucket) else dist.ReduceOp.SUM
        work = dist.all_reduce(bucket.sums, operation, group=bucket.copies, async_op=True)
        self._works.append(work)
        self._next += 1

    def _reset(self) -> None:
        self._next, self._works = 0, []  # type: tuple[int, list[Any]]
        for bucket in self.buckets:
            bucket.empty()
