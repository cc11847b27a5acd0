"""What loss and predictions are given in tests, and the loss by torch and over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipeline.model import loss as loss_module
from pipeline.model.loss import Projection, linear_cross_entropy

VOCAB, PADDED, HIDDEN = 91, 128, 24


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 50, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCAB, (3, 50), generator=generator)
    weights = torch.rand(3, 50, generator=generator)
    return hidden, weight, labels, weights


OPTIONS = [(0, 0, 1), (5.0, 0, 1), (0, 1e-2, 1), (3.0, 1e-2, 0.5)]
"""(softcap, z_loss_coeff, scale)."""


def plain(softcap: float, z: float, scale: float) -> list[torch.Tensor]:
    hidden, weight, labels, weights = inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    logits = scale * (hidden @ weight[:VOCAB].t())
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = (
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        + z * logits.logsumexp(-1).flatten() ** 2
    )
    total = (losses * weights.flatten()).sum()
    (3.0 * total).backward()
    return [total.detach(), hidden.grad, weight.grad]


def chunked(
    softcap: float, z: float, scale: float, chunk_bytes: int, compiled: bool = False
) -> list[Any]:
    """Over the world's ranks; whole gradients on rank 0."""
    loss_module.CHUNK_BYTES["cpu"] = chunk_bytes
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    hidden, weight, labels, weights = inputs()
    shard = weight.chunk(size)[rank].clone().requires_grad_()
    hidden.requires_grad_()
    group = dist.group.WORLD if size > 1 else None
    total = linear_cross_entropy(
        hidden, shard, labels, weights, Projection(VOCAB, softcap, z, scale, group, compiled)
    )
    (3.0 * total).backward()
    if size > 1:
        dist.all_reduce(hidden.grad)
    return [total.item(), hidden.grad.numpy(), shard.grad.numpy()]
