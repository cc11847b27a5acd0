"""What ranks exchange to share sequences: every head once, with its own keys, and back where it came from."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import run_on_ranks


@pytest.mark.parametrize(
    "groups, queries, ranks", [(2, 4, 8), (3, 4, 2), (4, 1, 2), (1, 6, 3), (6, 2, 4)]
)
def test_every_query_head_keeps_its_key_head_wherever_it_goes(
    groups: int, queries: int, ranks: int
) -> None:
    """Fewer key heads than ranks: a copy goes with each part of the queries that share it."""
    from pipeline.model.context_parallel import spread_groups

    # Each head's number of its group in front, behind it which of the group's heads it is.
    heads = torch.stack(
        [
            torch.arange(groups)[:, None].expand(groups, queries + 2),
            torch.arange(queries + 2).expand(groups, queries + 2),
        ],
        dim=-1,
    )[None, None]
    spread = spread_groups(heads, ranks)[0, 0]
    assert len(spread) % ranks == 0 and (spread[..., 0] == spread[:, :1, 0]).all()
    assert spread[:, :-2].flatten(0, 1).tolist() == heads[0, 0, :, :-2].flatten(0, 1).tolist()
    assert (spread[:, -2:, 1] == torch.tensor([queries, queries + 1])).all()
    gradient = torch.zeros(1, 1, groups, queries + 2, 2, requires_grad=True)
    spread_groups(gradient, ranks).sum().backward()
    copies = len(spread) // groups
    assert gradient.grad[0, 0, :, :-2].eq(1).all() and gradient.grad[0, 0, :, -2:].eq(copies).all()


def exchanged() -> list[bool]:
    """On two ranks: a whole sequence of this rank's heads, and everything as it was, gradients too."""
    from pipeline.model.context_parallel import exchange, gather_run

    group, rank = dist.group.WORLD, dist.get_rank()
    whole = torch.arange(2 * 6 * 4 * 3, dtype=torch.float32).view(2, 6, 4, 3)
    found = []
    for along in (0, 1):  # sequence-parallel layout, and ours
        of_layout = whole.transpose(0, 1) if along == 0 else whole
        mine = of_layout.chunk(2, dim=along)[rank].clone().requires_grad_()
        heads = exchange(mine, group, gather=along, split=2)
        back = exchange(heads, group, gather=2, split=along)
        back.backward(of_layout.chunk(2, dim=along)[rank])
        found += [
            torch.equal(heads, of_layout.chunk(2, dim=2)[rank]),
            torch.equal(back, mine),
            torch.equal(mine.grad, mine),
            torch.equal(gather_run(mine.detach(), group, dim=along), of_layout),
        ]
    return found


def test_an_exchange_gives_whole_sequences_and_its_backward_pass_gives_them_back() -> None:
    for found in run_on_ranks(exchanged, 2):
        assert all(found), found
