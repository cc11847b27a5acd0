"""Flat sums in buckets: every element becomes a mean where it is needed, however parameters lie across ranks' parts."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support.ranks import run_on_ranks

SIZES = (7, 50, 3, 20)
"""Elements of the parameters: the second has some in the part of each of three ranks."""
PADDED = 84


def reduced(to_owners: bool) -> tuple[list[float], list[tuple[int, int | None]], int]:
    """The flat sums afterwards, (elements, owner) of the buckets, and how many were launched before the end.

    Before: (rank + 1) * place. One parameter, another on each rank, never gets a gradient.
    """
    from pipeline.engine.deepspeed import reduction

    reduction.BUCKET_ELEMENTS = 10
    world, rank = dist.group.WORLD, dist.get_rank()
    assert world is not None
    members = [nn.Parameter(torch.zeros(size)) for size in SIZES]
    flat = torch.arange(PADDED, dtype=torch.float32) * (rank + 1)
    sums = reduction.FlatSums(flat, members, world)
    ours = reduction.Reduction([sums], world, members, to_owners=to_owners)
    for member in reversed([m for i, m in enumerate(members) if i != rank]):
        ours.arrived(member)
    early = ours._next
    ours.finish()
    return flat.tolist(), [(bucket.sums.numel(), bucket.owner) for bucket in ours.buckets], early


@pytest.mark.parametrize(
    ("to_owners", "buckets", "early"),
    [
        (True, [(20, 2), (21, 0), (28, 1), (4, 2), (7, 0)], [4, 1, 3]),
        (False, [(20, None), (53, None), (7, None)], [2, 1, 1]),
    ],
)
def test_every_element_is_a_mean_where_it_is_needed(
    to_owners: bool, buckets: list[tuple[int, int | None]], early: list[int]
) -> None:
    """The buckets from the end, those of a run of parameters cut where another rank's part begins."""
    part = PADDED // 3
    results = run_on_ranks(reduced, 3, to_owners)
    assert [launched for *_, launched in results] == early
    for rank, (flat, found, _) in enumerate(results):
        assert found == buckets, "ranks that reduce in another order wait for ever"
        for place in range(rank * part, (rank + 1) * part) if to_owners else range(PADDED):
            is_padding = place >= sum(SIZES)  # which nobody sends
            assert flat[place] == place * (rank + 1 if is_padding else 2)  # the mean of 1, 2, 3
