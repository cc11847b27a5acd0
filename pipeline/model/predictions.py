"""What a model predicts, asked without training it, in loss.py's chunks of tokens.

hidden (B, S, H), weight (V / tensor_parallel_size, H) -> the same on every tensor-parallel rank
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.model.loss import Projection, chunks, cross_entropy, logits_and_slope


@torch.no_grad()
def score_labels(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, projection: Projection
) -> tuple[Tensor, Tensor]:
    """The sum of `loss.linear_cross_entropy`, and which labels a greedy choice would have hit.

    Args:
        hidden, weight, labels, token_weights: as there.

    Returns:
        (0-dim fp32, (B, S) bool), equal on every tensor-parallel rank: a label is hit where no
        other token is likelier; of equally likely ones the lowest id is chosen, at any layout.
    """
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    weights = token_weights.reshape(-1).float()
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    hits = torch.empty_like(flat_labels, dtype=torch.bool)
    for part in chunks(flat, weight):
        logits, _ = logits_and_slope(flat[part] @ weight.t(), projection)
        losses, _ = cross_entropy(logits, flat_labels[part], projection, None)
        loss += losses @ weights[part]
        hits[part] = _likeliest(logits, projection) == flat_labels[part]
    return loss, hits.view_as(labels)


@torch.no_grad()
def label_losses(hidden: Tensor, weight: Tensor, labels: Tensor, projection: Projection) -> Tensor:
    """(B, S) fp32 cross entropy of each label; arguments as of `loss.linear_cross_entropy`."""
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    losses = torch.empty(flat_labels.shape, dtype=torch.float32, device=hidden.device)
    for part in chunks(flat, weight):
        logits, _ = logits_and_slope(flat[part] @ weight.t(), projection)
        losses[part], _ = cross_entropy(logits, flat_labels[part], projection, None)
    return losses.view_as(labels)


@torch.no_grad()
def likeliest_tokens(
    hidden: Tensor, weight: Tensor, projection: Projection, *, count: int
) -> tuple[Tensor, Tensor]:
    """The likeliest next tokens after each: ((B, S, count) ids, fp32 log-probabilities).

    Equal on every tensor-parallel rank, likeliest first; arguments as of `linear_cross_entropy`.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    ids = torch.empty(flat.shape[0], count, dtype=torch.int64, device=hidden.device)
    found = torch.empty(flat.shape[0], count, dtype=torch.float32, device=hidden.device)
    for part in chunks(flat, weight):
        logits, _ = logits_and_slope(flat[part] @ weight.t(), projection)
        best, columns = logits.float().topk(min(count, logits.shape[1]), dim=1)
        columns = columns + projection.rank * logits.shape[1]
        log_z = logits.float().logsumexp(1, keepdim=True)
        if projection.group is not None:  # every rank's best and normaliser travel, not its logits
            best, columns, log_z = (
                _side_by_side(t, projection.group) for t in (best, columns, log_z)
            )
            best, order = best.topk(count, dim=1)
            columns = columns.gather(1, order)
        ids[part], found[part] = columns, best - log_z.logsumexp(1, keepdim=True)
    return ids.view(*hidden.shape[:-1], count), found.view(*hidden.shape[:-1], count)


@torch.no_grad()
def divergences(
    hiddens: Sequence[Tensor],
    target: Tensor,
    weight: Tensor,
    token_weights: Tensor,
    projection: Projection,
) -> tuple[Tensor, list[Tensor]]:
    """How far what each hidden predicts is from what `target` predicts: KL(target || hidden).

    Args:
        hiddens: n of (B, S, H), normalised, as is `target` (B, S, H).
        weight, projection: as of `loss.linear_cross_entropy`.
        token_weights: (B, S).

    Returns:
        ((n,) fp32 weighted sums over tokens, their n gradients by (B, S, H) hidden, fp32), the same
        on every tensor-parallel rank.
    """
    flat, weights = target.reshape(-1, target.shape[-1]), token_weights.reshape(-1).float()
    sums = torch.zeros(len(hiddens), device=target.device)
    gradients = [torch.zeros_like(hidden, dtype=torch.float32) for hidden in hiddens]
    for part in chunks(flat, weight):
        wanted = _log_probabilities(
            logits_and_slope(flat[part] @ weight.t(), projection)[0], projection
        )
        chance = wanted.exp()
        for number, hidden in enumerate(hiddens):
            raw = hidden.reshape(flat.shape)[part] @ weight.t()
            logits, slope = logits_and_slope(raw, projection)
            said = _log_probabilities(logits, projection)
            # Padded columns are -inf in both: they have no part in it.
            apart = torch.where(chance > 0, chance * (wanted - said), 0.0)
            sums[number] += apart.sum(1) @ weights[part]
            by_logits = (said.exp() - chance) * slope * weights[part][:, None]
            gradients[number].view(flat.shape)[part] = by_logits @ weight.float()
    if projection.group is not None:  # columns are split: each rank has a part of every sum
        for value in (sums, *gradients):
            dist.all_reduce(value, group=projection.group)
    return sums, gradients


def _log_probabilities(logits: Tensor, projection: Projection) -> Tensor:
    """(N, V / ranks) fp32 of a chunk's final logits; padded columns are -inf."""
    logits = logits.float()
    log_z = logits.logsumexp(1, keepdim=True)
    if projection.group is not None:
        log_z = _side_by_side(log_z, projection.group).logsumexp(1, keepdim=True)
    return logits - log_z


@torch.no_grad()
def final_logits(hidden: Tensor, weight: Tensor, projection: Projection) -> Tensor:
    """(N, V) fp32, -inf where padded, of (N, H) hidden; whole on every tensor-parallel rank."""
    logits = logits_and_slope(hidden @ weight.t(), projection)[0].float()
    return logits if projection.group is None else _side_by_side(logits, projection.group)


def _side_by_side(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(N, ranks * columns) of (N, columns) from every rank."""
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def _likeliest(logits: Tensor, projection: Projection) -> Tensor:
    """(N,) ids of the largest of final logits (N, V / ranks); of equal ones the lowest id."""
    largest, ids = logits.max(dim=1)  # the first of equal columns
    if projection.group is None:
        return ids
    ids += projection.rank * logits.shape[1]
    here = largest.float()
    best = here.clone()
    dist.all_reduce(best, op=dist.ReduceOp.MAX, group=projection.group)
    # Ranks without such a logit stand back behind every id.
    ids = torch.where(here == best, ids, projection.vocab_size)
    dist.all_reduce(ids, op=dist.ReduceOp.MIN, group=projection.group)
    return ids
