"""Output projection and cross entropy in one: a micro-batch's logits never exist at once.

    hidden (B, S, H), weight (V / tensor_parallel_size, H), labels (B, S)
    -> sum of weights * cross entropy

Tokens go through in chunks: logits of a chunk, their loss, and in training at once the gradients of
hidden and weight, as in Liger's fused linear cross entropy (Hsu et al. 2024, arXiv:2410.10989). The
backward pass only scales them, so the projection costs its three matrix products and nothing is
recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# fp32 logits of one chunk; large enough to keep the matrix products efficient.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}


@dataclass(frozen=True)
class Projection:
    """What the output projection does besides multiplying."""

    vocab_size: int
    """Real vocabulary; columns from here on are padding and can never be predicted."""
    softcap: float = 0.0
    """cap * tanh(logits / cap) (Gemma 2, arXiv:2408.00118); 0: off."""
    z_loss_coeff: float = 0.0
    """Weight of log(Z)^2 (PaLM, arXiv:2204.02311, section 5); 0: off."""
    scale: float = 1.0
    """Factor on the logits (muP)."""
    group: dist.ProcessGroup | None = None
    """Tensor-parallel group that splits the vocabulary; None: it is whole here."""

    @property
    def rank(self) -> int:
        """Which slice of the vocabulary this rank holds."""
        return dist.get_rank(self.group) if self.group is not None else 0


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    projection: Projection,
) -> Tensor:
    """Weighted sum over tokens of the cross entropy of hidden @ weight^T.

    Args:
        hidden: (B, S, H), the same on every tensor-parallel rank.
        weight: (V / tensor_parallel_size, H), this rank's rows, padding included.
        labels: (B, S) int64 below projection.vocab_size.
        token_weights: (B, S) fp32; None: 1 / (B S) each, the mean.

    Returns:
        0-dim fp32, equal on every tensor-parallel rank. The gradient of `hidden` is this rank's
        part of the sum.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    weights = None if token_weights is None else token_weights.reshape(-1).float()
    return _LinearCrossEntropy.apply(flat, weight, labels.reshape(-1), weights, projection)


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss and, in the same pass, the gradients that the backward pass will only scale."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights, projection):  # type: ignore[no-untyped-def]
        """Sum of the chunks' losses; their gradients, for a loss gradient of 1, stay in ctx."""
        of_hidden, of_weight = ctx.needs_input_grad[:2]  # a frozen head saves one product of three
        needs_gradient = of_hidden or of_weight
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = None
        for part in _chunks(hidden, weight):
            here, importance = hidden[part], None if token_weights is None else token_weights[part]
            losses, grad_logits = _chunk_loss(
                here, weight, labels[part], projection, needs_gradient=needs_gradient
            )
            loss += losses.sum() if importance is None else losses @ importance
            if grad_logits is None:
                continue
            if grad_hidden is not None:
                torch.matmul(grad_logits, weight, out=grad_hidden[part])
                if importance is not None:  # on (N, H), not on the wider (N, V)
                    grad_hidden[part] *= importance[:, None]
            if not of_weight:
                continue
            if importance is not None:
                here = here * importance[:, None].to(here.dtype)
            if grad_weight is None:
                grad_weight = grad_logits.t() @ here
            elif grad_weight.dtype == here.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.t(), here)
            else:  # summed in fp32: in bf16 the sum would lose what the later chunks add
                grad_weight = grad_weight.float().add_(grad_logits.t() @ here)
        scale = 1.0 if token_weights is not None else 1.0 / labels.numel()
        if needs_gradient:
            assert grad_weight is not None or not of_weight, "no tokens"
            whole = None if grad_weight is None else grad_weight.to(weight.dtype)
            ctx.save_for_backward(grad_hidden, whole)
            ctx.scale = scale
        return loss * scale

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        scale = grad_loss * ctx.scale
        # In place: the copy would be as large as the embedding, and there is no second backward
        # pass.
        grads = (None if grad is None else grad.mul_(scale) for grad in ctx.saved_tensors)
        return *grads, None, None, None


@torch.no_grad()
def score_labels(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, projection: Projection
) -> tuple[Tensor, Tensor]:
    """The weighted sum of `linear_cross_entropy`, and which labels a greedy choice would have hit.

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
    for part in _chunks(flat, weight):
        logits, _ = _final_logits(flat[part] @ weight.t(), projection)
        losses, _ = _cross_entropy(logits, flat_labels[part], projection, None)
        loss += losses @ weights[part]
        hits[part] = _likeliest(logits, projection) == flat_labels[part]
    return loss, hits.view_as(labels)


@torch.no_grad()
def label_losses(hidden: Tensor, weight: Tensor, labels: Tensor, projection: Projection) -> Tensor:
    """(B, S) fp32 cross entropy of each label; arguments as of `linear_cross_entropy`."""
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    losses = torch.empty(flat_labels.shape, dtype=torch.float32, device=hidden.device)
    for part in _chunks(flat, weight):
        logits, _ = _final_logits(flat[part] @ weight.t(), projection)
        losses[part], _ = _cross_entropy(logits, flat_labels[part], projection, None)
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
    for part in _chunks(flat, weight):
        logits, _ = _final_logits(flat[part] @ weight.t(), projection)
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
        weight, projection: as of `linear_cross_entropy`.
        token_weights: (B, S).

    Returns:
        ((n,) fp32 weighted sums over tokens, their n gradients by (B, S, H) hidden, fp32), the same
        on every tensor-parallel rank.
    """
    flat, weights = target.reshape(-1, target.shape[-1]), token_weights.reshape(-1).float()
    sums = torch.zeros(len(hiddens), device=target.device)
    gradients = [torch.zeros_like(hidden, dtype=torch.float32) for hidden in hiddens]
    for part in _chunks(flat, weight):
        wanted = _log_probabilities(
            _final_logits(flat[part] @ weight.t(), projection)[0], projection
        )
        chance = wanted.exp()
        for number, hidden in enumerate(hiddens):
            raw = hidden.reshape(flat.shape)[part] @ weight.t()
            logits, slope = _final_logits(raw, projection)
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
    logits = _final_logits(hidden @ weight.t(), projection)[0].float()
    return logits if projection.group is None else _side_by_side(logits, projection.group)


def _side_by_side(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(N, ranks * columns) of (N, columns) from every rank."""
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def _chunk_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, projection: Projection, *, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """(losses (N,) fp32, gradient by the logits, in their dtype) of a chunk (N, H)."""
    raw = hidden @ weight.t()
    logits, slope = _final_logits(raw, projection)
    losses, gradient = _cross_entropy(logits, labels, projection, slope if needs_gradient else None)
    return losses, None if gradient is None else gradient.to(raw.dtype)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Rows of hidden (N, H) whose logits exist at once."""
    # 524 tokens on CPU at 32,000 columns. The 16 are for vocabularies so wide that a chunk would
    # be a few rows, and the products would read the whole weight for each of them.
    chunk = max(16, CHUNK_BYTES[hidden.device.type] // (4 * weight.shape[0]))
    for start in range(0, hidden.shape[0], chunk):
        yield slice(start, start + chunk)


def _final_logits(logits: Tensor, projection: Projection) -> tuple[Tensor, Tensor | float]:
    """(what the softmax takes, derivative of it by the raw logits); may overwrite its argument."""
    # With x the raw logits the loss sees y = cap * tanh(scale * x / cap), and the gradient by x is
    # the one by y times dy / dx = scale * (1 - tanh^2): `slope`.
    slope: Tensor | float = projection.scale
    if projection.scale != 1.0:
        logits = logits * projection.scale
    if projection.softcap:
        bent = torch.tanh(logits.float() / projection.softcap)
        logits, slope = projection.softcap * bent, slope * (1 - bent.square())
    # After the cap, which would lift -inf to -cap; then padding has probability 0, gradient 0.
    padding = (projection.rank + 1) * logits.shape[1] - projection.vocab_size
    if padding > 0:
        logits[:, max(0, logits.shape[1] - padding) :] = float("-inf")
    return logits, slope


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


def _cross_entropy(
    logits: Tensor, labels: Tensor, projection: Projection, slope: Tensor | float | None
) -> tuple[Tensor, Tensor | None]:
    """(losses (N,), gradient by the raw logits (N, V / ranks)), fp32, of a chunk's final logits.

    slope: of `_final_logits`; None: no gradient is wanted.
    """
    first = projection.rank * logits.shape[1]
    # A label in another rank's columns is read at a place of ours that does not count.
    columns = (labels - first)[:, None]
    is_here = (columns >= 0) & (columns < logits.shape[1])
    columns = columns.clamp(0, logits.shape[1] - 1)
    target = logits.gather(1, columns).float()
    if projection.group is None:
        # The largest probability is 1 / sum(exp(logits - maximum)): no exponential is taken twice.
        probability, maximum = (
            logits.softmax(dim=-1, dtype=torch.float32),
            logits.amax(dim=1, keepdim=True).float(),
        )
        log_z = maximum - probability.amax(dim=1, keepdim=True).log()
    else:
        # Not times 0: a rank of padding only has -inf there.
        target = torch.where(is_here, target, 0.0)
        probability, log_z, target = _parallel_softmax(logits, target, projection.group)
    losses = (log_z - target).squeeze(1)
    if projection.z_loss_coeff:
        losses = losses + projection.z_loss_coeff * log_z.squeeze(1).square()
    if slope is None:
        return losses, None
    gradient = probability  # d(log_z - target + c log_z^2) / d logits = p (1 + 2 c log_z) - one_hot
    if projection.z_loss_coeff:
        gradient *= 1 + 2 * projection.z_loss_coeff * log_z
    gradient.scatter_add_(1, columns, -is_here.float())
    if projection.softcap or projection.scale != 1.0:
        gradient *= slope
    return losses, gradient


def _parallel_softmax(
    logits: Tensor, target: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """(softmax (N, V / ranks), its log-normaliser, `target` summed, both (N, 1)), all fp32.

    Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3: only (N,) numbers travel.
    """
    logits = logits.float()
    maximum = logits.amax(dim=1, keepdim=True)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    probability = (logits - maximum).exp_()
    sums = torch.cat([probability.sum(dim=1, keepdim=True), target], dim=1)
    dist.all_reduce(sums, group=group)
    total, target = sums.split(1, dim=1)
    return probability.div_(total), total.log() + maximum, target
