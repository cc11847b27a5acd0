"""Output projection and cross entropy in one: a micro-batch's logits never exist at once.

    hidden (B, S, H), weight (V / tensor_parallel_size, H), labels (B, S)
    -> sum of weights * cross entropy

Tokens go through in chunks: logits of a chunk, their loss, and in training at once the gradients of
hidden and weight, as in Liger's fused linear cross entropy (Hsu et al. 2024, arXiv:2410.10989). The
backward pass only scales them, so the projection costs its three matrix products and nothing is
recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.model.fused_loss import Columns, losses_and_gradient

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
    compiled: bool = False
    """Training by fused_loss.py."""

    @property
    def rank(self) -> int:
        """Which slice of the vocabulary this rank holds."""
        return dist.get_rank(self.group) if self.group is not None else 0

    def columns(self, here: int) -> Columns:
        """The same for fused_loss.py, of a rank with `here` columns."""
        first = self.rank * here
        return Columns(first, self.vocab_size, self.scale, self.softcap, self.z_loss_coeff)


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
    if (
        not torch.is_grad_enabled()
    ):  # autograd tells a function what asks for gradients all the same
        weight = weight.detach()
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
        for part in chunks(hidden, weight):
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


def _chunk_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, projection: Projection, *, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """(losses (N,) fp32, gradient by the logits, in their dtype) of a chunk (N, H)."""
    raw = hidden @ weight.t()
    if needs_gradient and projection.compiled:
        return losses_and_gradient(raw, labels, projection.columns(raw.shape[1]), projection.group)
    logits, slope = logits_and_slope(raw, projection)
    losses, gradient = cross_entropy(logits, labels, projection, slope if needs_gradient else None)
    return losses, None if gradient is None else gradient.to(raw.dtype)


def chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Rows of hidden (N, H) whose logits exist at once."""
    # 524 tokens on CPU at 32,000 columns. The 16 are for vocabularies so wide that a chunk would
    # be a few rows, and the products would read the whole weight for each of them.
    chunk = max(16, CHUNK_BYTES[hidden.device.type] // (4 * weight.shape[0]))
    if hidden.is_cuda:  # whole tiles of a product, and chunks of one shape, which is compiled once
        chunk = 1 << (chunk.bit_length() - 1)
    for start in range(0, hidden.shape[0], chunk):
        yield slice(start, start + chunk)


def logits_and_slope(logits: Tensor, projection: Projection) -> tuple[Tensor, Tensor | float]:
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


def cross_entropy(
    logits: Tensor, labels: Tensor, projection: Projection, slope: Tensor | float | None
) -> tuple[Tensor, Tensor | None]:
    """(losses (N,), gradient by the raw logits (N, V / ranks)), fp32, of a chunk's final logits.

    slope: of `logits_and_slope`; None: no gradient is wanted.
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
