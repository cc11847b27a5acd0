"""A chunk's cross entropy and its gradient in two compiled passes over the logits (model.compile).

    raw logits (N, V / ranks) --statistics--> three numbers a token, the only ones that travel
                              --gradient----> (N, V / ranks), in the logits' dtype

loss.py's own operators walk over a chunk eleven times and hold it three times in fp32; a compiled
pass keeps fp32 in registers. Each exponential is taken twice for it, which a device has time for.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

LEAST = torch.finfo(torch.float32).min  # in place of -inf: -inf - -inf is no number


class Columns(NamedTuple):
    """What stands between the raw logits and the softmax, and which part of them is here."""

    first: int
    """Id of this rank's first column."""
    vocab_size: int
    """Ids from here on are padding."""
    scale: float
    softcap: float
    z_loss_coeff: float


def losses_and_gradient(
    raw: Tensor, labels: Tensor, columns: Columns, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """((N,) fp32 losses, (N, V / ranks) their gradient by `raw`, in its dtype).

    Args:
        raw: (N, V / ranks) products of hidden states and the output weight.
        labels: (N,) int64 below columns.vocab_size.
        columns: see there.
        group: the ranks that split the columns; None: all are here. Collective over it.
    """
    largest, total, target = compiled(_statistics)(raw, labels, columns)
    if group is not None:
        highest = largest.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        sums = torch.stack([total * (largest - highest).exp(), target])
        dist.all_reduce(sums, group=group)
        largest, (total, target) = highest, sums.unbind()
    log_z = largest + total.log()
    losses = log_z - target
    if columns.z_loss_coeff:
        losses = losses + columns.z_loss_coeff * log_z.square()
    return losses, compiled(_gradient)(raw, labels, log_z, columns)


@cache
def compiled(function: Any) -> Any:
    """`function` by torch.compile, once a process."""
    return torch.compile(function)


def _final(raw: Tensor, columns: Columns) -> tuple[Tensor, Tensor | float, Tensor]:
    """(fp32 logits as the softmax takes them, their derivative by `raw`, ids of the columns)."""
    ids = torch.arange(raw.shape[1], device=raw.device) + columns.first
    logits = raw.float() * columns.scale
    slope: Tensor | float = columns.scale
    if columns.softcap:
        bent = torch.tanh(logits / columns.softcap)
        logits, slope = columns.softcap * bent, slope * (1 - bent.square())
    # After the cap, which would lift -inf to -cap.
    return torch.where(ids < columns.vocab_size, logits, float("-inf")), slope, ids


def _statistics(raw: Tensor, labels: Tensor, columns: Columns) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) each: the largest logit here, sum of exp(logit - largest), the label's logit or 0."""
    logits, _, ids = _final(raw, columns)
    largest = logits.amax(1).clamp(min=LEAST)  # a rank may hold padding only
    total = (logits - largest[:, None]).exp().sum(1)
    return largest, total, torch.where(ids == labels[:, None], logits, 0.0).sum(1)


def _gradient(raw: Tensor, labels: Tensor, log_z: Tensor, columns: Columns) -> Tensor:
    """d(log_z - target + c log_z^2) / d raw = (p (1 + 2 c log_z) - one_hot) * slope."""
    logits, slope, ids = _final(raw, columns)
    gradient = (logits - log_z[:, None]).exp()
    if columns.z_loss_coeff:
        gradient = gradient * (1 + 2 * columns.z_loss_coeff * log_z[:, None])
    gradient = (gradient - (ids == labels[:, None]).float()) * slope
    return gradient.to(raw.dtype)
