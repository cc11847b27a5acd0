"""Causal attention in blocks of rows: nothing of size S x S, with or without documents.

As in flash attention the scores are fp32, exist a block at a time, and are computed again in the
backward pass; here by batched matrix products and softmax, which any device has. Two uses:

- one CPU thread, where torch's kernel is slow: blocks small enough for the cache. With more threads
  each of these operators ends in a barrier, and torch's kernel, which spreads whole heads over the
  threads, is the faster one. Figures: docs/performance.md.
- attention inside documents where no kernel knows them (documents.py). What a query sees is one
  number, the first token of its document; a block multiplies no key before that of its first query.

B batch, G key/value heads, Q query heads of each, S sequence, D head width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

# Queries of a block: it computes the keys up to its own last row, no later ones. On a device fewer
# and larger blocks: a launch there costs what 10^9 operations do.
BLOCK_ROWS = {"cpu": 64, "cuda": 512}
SCORE_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}  # fp32 scores at a time
SHORT_ROWS = 256  # below so many tokens torch's fp32 kernel is as fast


def is_faster(q: Tensor) -> bool:
    """Whether `causal_attention` is faster than torch's kernel for these queries."""
    if q.device.type != "cpu" or torch.get_num_threads() > 1:
        return False
    return q.dtype is torch.bfloat16 or (q.dtype is torch.float32 and q.shape[2] >= SHORT_ROWS)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    starts: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale * q k^T) v where a query sees no later key: (B, G * Q, S, D) in q's dtype.

    Args:
        q: (B, G * Q, S, D).
        k, v: (B, G, S, D).
        scale: of the scores.
        starts: (B, S) int64, ascending in each row: the first key each query sees; None: key 0.
        dropout: probability with which a share of the softmax is left out, the others raised by
            1 / (1 - dropout); drawn from the device's default generator.
    Source: Dao et al. 2022, arXiv:2205.14135: blocks of rows, nothing of size S x S kept.
    """
    return _CausalAttention.apply(q, k, v, scale, starts, dropout)


class _CausalAttention(Function):
    """Blocks of rows; the backward pass computes their probabilities again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        starts: Tensor | None,
        dropout: float,
    ) -> Tensor:
        batch, groups = k.shape[:2]
        q, k, v = _by_group(q, groups), k.flatten(0, 1), v.flatten(0, 1)
        ctx.save_for_backward(q, k, v, starts)
        ctx.scale, ctx.batch, ctx.dropout = scale, batch, dropout
        ctx.generator = _generator_state(q.device) if dropout else None
        out = torch.empty_like(q)
        for part, rows, seen, probability in _blocks(q, k, scale, starts):
            if dropout:
                probability = probability * _kept(probability, dropout)
            torch.bmm(probability.to(v.dtype), v[part, seen], out=_of(out, part, rows))
        return _by_head(out, batch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """With S = scale * q k^T, P = softmax(S), O = P v, and d for the loss's gradient by it:

        dv = P^T dO, dP = dO v^T, dS = P * (dP - rowsum(P * dP)), dq = scale * dS k,
        dk = scale * dS^T q. With dropout M * P stands for P in O and dv, M * dP for dP. A query
        lies in one block, so dq is written once; a key is in the block of every later query, and
        dk, dv are sums over up to S / 64 blocks: in fp32, as bf16 would lose what the later ones
        add.
        """
        (q, k, v, starts), scale, dropout = ctx.saved_tensors, ctx.scale, ctx.dropout
        grad, grad_q = _by_group(grad, k.shape[0] // ctx.batch), torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(k, dtype=torch.float32) for _ in "kv")
        with _replaying(ctx.generator, q.device):
            for part, rows, seen, probability in _blocks(q, k, scale, starts):
                q_here, grad_here = _of(q, part, rows), _of(grad, part, rows)
                grad_scores = torch.bmm(grad_here, v[part, seen].transpose(1, 2)).float()
                share = probability
                if dropout:
                    kept = _kept(probability, dropout)
                    share, grad_scores = probability * kept, grad_scores.mul_(kept)
                _add_product(grad_v[part, seen], share.to(v.dtype).transpose(1, 2), grad_here)
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
        return grads[0], *(g.unflatten(0, (ctx.batch, -1)) for g in grads[1:]), None, None, None


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


class _Block(NamedTuple):
    part: slice
    """Of the B * G heads."""
    rows: slice
    """Queries."""
    seen: slice
    """Keys."""
    probability: Tensor
    """(heads, rows * Q, keys) fp32."""


def _blocks(q: Tensor, k: Tensor, scale: float, starts: Tensor | None) -> Iterator[_Block]:
    """Every block, in an order that forward and backward pass share.

    q as of `_by_group`, k (B * G, S, D).
    """
    heads, size, queries, _ = q.shape
    block_rows = min(BLOCK_ROWS[q.device.type], size)
    q, k = q.float() * scale, k.float()
    later = _later(block_rows, q.device)
    # Heads at a time: 8 at S = 1024 and one query head a group (64 x 1024 fp32 scores each). Heads
    # of one sequence share its documents, others' are not among them.
    step = max(1, SCORE_BYTES[q.device.type] // (4 * queries * block_rows * size))
    of_sequence = heads if starts is None else heads // len(starts)
    firsts = _first_keys(starts, block_rows)
    for sequence in range(heads // of_sequence):
        end = (sequence + 1) * of_sequence
        for head in range(sequence * of_sequence, end, step):
            part = slice(head, min(head + step, end))
            for number, row in enumerate(range(0, size, block_rows)):
                rows = slice(row, min(row + block_rows, size))
                first = firsts[sequence][number] if firsts else 0
                seen, count = slice(first, rows.stop), rows.stop - row
                scores = torch.bmm(_of(q, part, rows), k[part, seen].transpose(1, 2))
                by_row = scores.unflatten(1, (count, queries))
                # Only the square at the diagonal has later keys; those left of it are none.
                by_row[..., row - first :] += later[:count, :, :count]
                if starts is not None:
                    keys = torch.arange(first, rows.stop, device=q.device)
                    foreign = keys < starts[sequence, rows, None]
                    by_row.masked_fill_(foreign[:, None], -math.inf)
                yield _Block(part, rows, seen, scores.softmax(-1))


def _first_keys(starts: Tensor | None, block_rows: int) -> list[list[int]]:
    """For each sequence the first key that each block sees; [] for key 0 everywhere.

    On the CPU only, where a number is read for nothing: on a device each would make the host wait,
    and all earlier keys are multiplied and masked.
    """
    if starts is None or starts.device.type != "cpu":
        return []
    return starts[:, ::block_rows].tolist()


def _later(size: int, device: torch.device) -> Tensor:
    """(size, 1, size): -inf where the key is later than the query, else 0."""
    return torch.full((size, size), -math.inf, device=device).triu_(1)[:, None]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Total += a b, fp32 sums also of bf16 factors."""
    if a.dtype is total.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)


# ---- dropout -------------------------------------------------------------------------------------


def _kept(probability: Tensor, dropout: float) -> Tensor:
    """0 where a share is left out, else 1 / (1 - dropout); drawn anew at each call."""
    return torch.empty_like(probability).bernoulli_(1 - dropout).div_(1 - dropout)


def _generator_state(device: torch.device) -> Tensor:
    """Of the default generator: on the host, wherever it draws."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


@contextlib.contextmanager
def _replaying(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """The default generator at `state`, and afterwards where it was; None: nothing is drawn."""
    if state is None:
        yield
        return
    now = _generator_state(device)
    restore = (
        torch.set_rng_state
        if device.type == "cpu"
        else lambda state: torch.cuda.set_rng_state(state, device)
    )
    restore(state)
    try:
        yield
    finally:
        restore(now)
