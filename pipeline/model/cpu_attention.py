"""Causal attention for one CPU thread, where torch's is slow; equal within rounding.

As in flash attention the scores are fp32, exist a block at a time, small enough for the cache, and
are computed again in the backward pass; here by batched matrix products and softmax, which torch
does fast. With more threads each of these operators ends in a barrier, and torch's kernel, which
spreads whole heads over the threads, is the faster one. Figures: docs/performance.md.

B batch, G key/value heads, Q query heads of each, S sequence, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

BLOCK_ROWS = 64  # queries of a block: it computes the keys up to its own last row, no later ones
SCORE_BYTES = 2 * 2**20  # fp32 scores at a time
SHORT_ROWS = 256  # below so many tokens torch's fp32 kernel is as fast


def is_faster(q: Tensor) -> bool:
    """Whether `causal_attention` is faster than torch's kernel for these queries."""
    if q.device.type != "cpu" or torch.get_num_threads() > 1:
        return False
    return q.dtype is torch.bfloat16 or (q.dtype is torch.float32 and q.shape[2] >= SHORT_ROWS)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v where a query sees no later key: (B, G * Q, S, D) in the dtype of q.

    Args:
        q: (B, G * Q, S, D).
        k, v: (B, G, S, D).
    Source: Dao et al. 2022, arXiv:2205.14135: blocks of rows, nothing of size S x S kept.
    """
    return _CausalAttention.apply(q, k, v, scale)


class _CausalAttention(Function):
    """Blocks of rows; the backward pass computes their probabilities again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        batch, groups = k.shape[:2]
        q, k, v = _by_group(q, groups), k.flatten(0, 1), v.flatten(0, 1)
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.batch = scale, batch
        out = torch.empty_like(q)
        for part, rows, probability in _blocks(q, k, scale):
            torch.bmm(probability.to(v.dtype), v[part, : rows.stop], out=_of(out, part, rows))
        return _by_head(out, batch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """With S = scale * q k^T, P = softmax(S), O = P v, and d for the loss's gradient by it:

        dv = P^T dO, dP = dO v^T, dS = P * (dP - rowsum(P * dP)), dq = scale * dS k,
        dk = scale * dS^T q. A query lies in one block, so dq is written once; a key is in the block
        of every later query, and dk, dv are sums over up to S / 64 blocks: in fp32, as bf16 would
        lose what the later ones add.
        """
        (q, k, v), scale = ctx.saved_tensors, ctx.scale
        grad, grad_q = _by_group(grad, k.shape[0] // ctx.batch), torch.empty_like(q)
        grad_k, grad_v = (torch.zeros(k.shape, dtype=torch.float32) for _ in "kv")
        for part, rows, probability in _blocks(q, k, scale):
            seen = slice(rows.stop)
            q_here, grad_here = _of(q, part, rows), _of(grad, part, rows)
            _add_product(grad_v[part, seen], probability.to(v.dtype).transpose(1, 2), grad_here)
            grad_scores = torch.bmm(grad_here, v[part, seen].transpose(1, 2)).float()
            grad_scores = torch._softmax_backward_data(
                grad_scores, probability, -1, torch.float32
            ).to(q.dtype)
            _add_product(grad_k[part, seen], grad_scores.transpose(1, 2), q_here)
            torch.bmm(grad_scores, k[part, seen], out=_of(grad_q, part, rows))
        grads = (
            _by_head(grad_q.mul_(scale), ctx.batch),
            grad_k.mul_(scale).to(k.dtype),
            grad_v.to(v.dtype),
        )
        return grads[0], *(g.unflatten(0, (ctx.batch, -1)) for g in grads[1:]), None


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(B, G * Q, S, D) -> (B * G, S, Q, D), contiguous."""
    return x.unflatten(1, (groups, -1)).transpose(2, 3).flatten(0, 1).contiguous()


def _by_head(x: Tensor, batch: int) -> Tensor:
    """(B * G, S, Q, D) -> (B, G * Q, S, D)."""
    return x.unflatten(0, (batch, -1)).transpose(2, 3).flatten(1, 2)


def _of(x: Tensor, part: slice, rows: slice) -> Tensor:
    """(heads, rows * Q, D) of a tensor as of `_by_group`: a view, never a copy."""
    block = x[part, rows]
    return block.view(block.shape[0], -1, block.shape[-1])


def _blocks(q: Tensor, k: Tensor, scale: float) -> Iterator[tuple[slice, slice, Tensor]]:
    """(heads, rows, probability (heads, rows * Q, keys) fp32) of every block.

    q as of `_by_group`, k (B * G, S, D).
    """
    heads, size, queries, _ = q.shape
    q, k = q.float() * scale, k.float()
    later = _later(min(BLOCK_ROWS, size))
    # Heads at a time: 8 at S = 1024 and one query head a group (64 x 1024 fp32 scores each).
    step = max(1, SCORE_BYTES // (4 * queries * min(BLOCK_ROWS, size) * size))
    for first in range(0, heads, step):
        part = slice(first, min(first + step, heads))
        for start in range(0, size, BLOCK_ROWS):
            rows = slice(start, min(start + BLOCK_ROWS, size))
            count = rows.stop - start
            scores = torch.bmm(_of(q, part, rows), k[part, : rows.stop].transpose(1, 2))
            # Only the square at the diagonal has later keys; those left of it are all seen.
            scores.unflatten(1, (count, queries))[..., start:] += later[:count, :, :count]
            yield part, rows, scores.softmax(-1)


def _later(size: int) -> Tensor:
    """(size, 1, size): -inf where the key is later than the query, else 0."""
    return torch.full((size, size), -math.inf).triu_(1)[:, None]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Total += a b, fp32 sums also of bf16 factors."""
    if a.dtype is total.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)
