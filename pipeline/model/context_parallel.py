"""Context parallelism: ranks share each sequence; in attention each has all of it, of some heads.

    (B, S / ranks, heads, D)  --exchange-->  (B, S, heads / ranks, D)  --attention, exchange back-->

Everything but attention works token by token and never hears of it. Inside attention every rank
holds whole sequences of its heads, so that kernels, document starts, rotation and norms of heads
are those of one rank, and the work is balanced whatever the documents are. A rank sends and gets
(ranks - 1) / ranks of its queries, keys, values and context a block, forward and backward.

Source: Jacobs et al. 2023 (DeepSpeed Ulysses), arXiv:2309.14509.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


def context_group() -> dist.ProcessGroup:
    """The ranks that share this rank's sequences."""
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_group()


def spread_groups(qkv: Tensor, ranks: int) -> Tensor:
    """Groups of query heads, as many as `ranks` can share: (..., G * c, Q / c + 2, D).

    Each group's key and value stand c times, the least that makes G * c a multiple of `ranks`, each
    time with its part of the group's query heads; autograd adds the copies' gradients up.

    Args:
        qkv: (..., G, Q + 2, D); G * Q is a multiple of `ranks`.
        ranks: that share the groups.
    """
    groups, queries = qkv.shape[-3], qkv.shape[-2] - 2
    copies = ranks // math.gcd(groups, ranks)
    if copies == 1:
        return qkv
    q, kv = qkv.split((queries, 2), dim=-2)
    q = q.unflatten(-2, (copies, queries // copies)).flatten(-4, -3)
    return torch.cat([q, kv.repeat_interleave(copies, dim=-3)], dim=-2)


# Not traced: torch.compile goes on behind it.
@torch.compiler.disable
def exchange(x: Tensor, group: dist.ProcessGroup, *, gather: int, split: int) -> Tensor:
    """`x` whole along `gather`, and this rank's part along `split`. Collective: call on all of it.

    Args:
        x: this rank's part along `gather`; its size along `split` is a multiple of the ranks.
        group: whose ranks hold the other parts, in order.
    """
    return _Exchange.apply(x, group, gather, split)


class _Exchange(Function):
    """An all-to-all, whose backward pass is itself with the dimensions swapped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, gather: int, split: int) -> Tensor:
        ctx.group, ctx.gather, ctx.split = group, gather, split
        return _all_to_all(x, group, gather=gather, split=split)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        back = _all_to_all(grad, ctx.group, gather=ctx.split, split=ctx.gather)
        return back, None, None, None


def _all_to_all(x: Tensor, group: dist.ProcessGroup, *, gather: int, split: int) -> Tensor:
    # One dimension more, in front: the rank a part goes to, and afterwards the one it came from.
    outgoing = x.unflatten(split, (group.size(), -1)).movedim(split, 0).contiguous()
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=group)
    return incoming.movedim(0, gather).flatten(gather, gather + 1)


def gather_run(x: Tensor, group: dist.ProcessGroup, *, dim: int) -> Tensor:
    """Whole sequences of every rank's run of them, without gradient. Collective."""
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=dim)
