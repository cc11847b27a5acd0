"""Gradient sums of data-parallel ranks, reduced where they lie while the backward pass runs.

flat sums, their parameters --cut from the end--> buckets
last micro-batch's gradients --arrived()--> a full bucket is reduced --finish()--> means
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn

from pipeline.distributed.waits import wait_for

# Gradients of one reduction, Megatron-LM's default: small enough to start early, large enough to
# fill a link.
BUCKET_ELEMENTS = 40_000_000
LEAST_BUCKETS = 8  # of a small model, which would otherwise be one bucket and wait for its end


@dataclass(frozen=True)
class FlatSums:
    """The sums of one of the optimizer's parameter groups."""

    flat: Tensor
    """One after the other, and padding."""
    members: Sequence[nn.Parameter]
    """Whose they are, in this order."""
    copies: dist.ProcessGroup
    """Ranks that hold the same parameters: all data-parallel ones, or fewer of experts."""


@dataclass
class _Bucket:
    sums: Tensor
    """A run of a group's flat sums."""
    num_members: int
    first: int
    """Position in the model of its first parameter, whose gradient comes last."""
    num_missing: int
    copies: dist.ProcessGroup
    owner: int | None
    """The only rank (of the world) that needs the means; None: each of them does."""

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
        self,
        sums: Sequence[FlatSums],
        group: dist.ProcessGroup,
        parameters: Sequence[nn.Parameter],
        *,
        to_owners: bool,
    ) -> None:
        """Cut the sums into buckets.

        Args:
            group: the data-parallel ranks.
            parameters: of the model, in the order of the forward pass.
            to_owners: only the rank whose part of a group's flat sums it is, of as many equal parts
                as copies, gets a mean: half of what an all-reduce sends.
        """
        self.group = group
        # NCCL divides on the way, by the size of the bucket's own group; gloo does not.
        self.can_average = sums[0].flat.is_cuda
        self._place = {id(parameter): i for i, parameter in enumerate(parameters)}
        self._buckets_of: dict[int, list[_Bucket]] = defaultdict(list)
        self.buckets: list[_Bucket] = []
        total = sum(member.numel() for each in sums for member in each.members)
        for each in sums:
            self._cut(each, min(BUCKET_ELEMENTS, -(-total // LEAST_BUCKETS)), to_owners)
        self.buckets.sort(key=lambda bucket: -bucket.first)
        self._reset()

    def _cut(self, sums: FlatSums, size: int, to_owners: bool) -> None:
        """Cut a group's flat sums into buckets from its end: the last layers are ready first."""
        stop = start = sum(member.numel() for member in sums.members)
        run: list[tuple[int, nn.Parameter]] = []
        for member in reversed(sums.members):
            start -= member.numel()
            run.append((start, member))
            if stop - start < size and start > 0:
                continue
            if to_owners:
                part = sums.flat.numel() // sums.copies.size()
                for i in range(start // part, -(-stop // part)):
                    owner = dist.get_global_rank(sums.copies, i)
                    self._add(sums, run, max(start, i * part), min(stop, (i + 1) * part), owner)
            else:
                self._add(sums, run, start, stop, None)
            stop, run = start, []

    def _add(
        self,
        sums: FlatSums,
        run: list[tuple[int, nn.Parameter]],
        start: int,
        stop: int,
        owner: int | None,
    ) -> None:
        """A bucket of the elements from start to stop, of those of `run` (offset, member)."""
        inside = [p for at, p in run if at < stop and at + p.numel() > start]
        first = min(self._place[id(parameter)] for parameter in inside)
        copies = self.group if sums.copies.size() == self.group.size() else sums.copies
        count = len(inside)
        bucket = _Bucket(sums.flat[start:stop], count, first, count, copies, owner)
        self.buckets.append(bucket)
        for parameter in inside:
            self._buckets_of[id(parameter)].append(bucket)

    def arrived(self, parameter: nn.Parameter) -> None:
        """A parameter's last gradient of a step is in its sum. Collective if a bucket is full."""
        for bucket in self._buckets_of[id(parameter)]:
            bucket.take_one()
        while self._next < len(self.buckets) and self.buckets[self._next].num_missing == 0:
            self._launch()

    def finish(self) -> None:
        """All sums are means, where they are needed. Collective over the data-parallel ranks."""
        while self._next < len(self.buckets):
            self._launch()
        wait_for(self._works)
        for bucket in self.buckets:
            # Of an expert's tokens each of its copies has seen its own: those of all data-parallel
            # ranks in the end, by whose number a mean divides.
            if not self._averages(bucket) and bucket.owner in (None, dist.get_rank()):
                bucket.sums.mul_(1.0 / self.group.size())
        self._reset()

    def _averages(self, bucket: _Bucket) -> bool:
        """Whether the reduction of a bucket divides by the number of data-parallel ranks."""
        return self.can_average and bucket.copies is self.group

    def _launch(self) -> None:
        bucket = self.buckets[self._next]
        operation = dist.ReduceOp.AVG if self._averages(bucket) else dist.ReduceOp.SUM
        sums, group = bucket.sums, bucket.copies
        if bucket.owner is None:
            work = dist.all_reduce(sums, operation, group=group, async_op=True)
        else:
            work = dist.reduce(sums, bucket.owner, operation, group=group, async_op=True)
        self._works.append(work)
        self._next += 1

    def _reset(self) -> None:
        self._next = 0
        self._works: list[dist.Work] = []
        for bucket in self.buckets:
            bucket.empty()
