"""Output projection and cross entropy in chunks against torch's own, value and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipeline.model import loss as loss_module
from pipeline.model.loss import Projection, linear_cross_entropy
from tests.support.ranks import run_on_ranks

VOCAB, PADDED, HIDDEN = 91, 128, 24


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 50, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCAB, (3, 50), generator=generator)
    weights = torch.rand(3, 50, generator=generator)
    return hidden, weight, labels, weights


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


def chunked(softcap: float, z: float, scale: float, chunk_bytes: int) -> list[Any]:
    """Over the world's ranks; whole gradients on rank 0."""
    loss_module.CHUNK_BYTES["cpu"] = chunk_bytes
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    hidden, weight, labels, weights = inputs()
    shard = weight.chunk(size)[rank].clone().requires_grad_()
    hidden.requires_grad_()
    group = dist.group.WORLD if size > 1 else None
    total = linear_cross_entropy(
        hidden, shard, labels, weights, Projection(VOCAB, softcap, z, scale, group)
    )
    (3.0 * total).backward()
    if size > 1:
        dist.all_reduce(hidden.grad)
    return [total.item(), hidden.grad.numpy(), shard.grad.numpy()]


@pytest.mark.parametrize(
    "softcap, z, scale", [(0, 0, 1), (5.0, 0, 1), (0, 1e-2, 1), (3.0, 1e-2, 0.5)]
)
@pytest.mark.parametrize("chunk_bytes", [2**10, 2**30])
def test_chunks_equal_torch_on_one_rank(
    softcap: float, z: float, scale: float, chunk_bytes: int
) -> None:
    """Padding columns count for nothing, and a chunk's size changes nothing."""
    for got, want in zip(chunked(softcap, z, scale, chunk_bytes), plain(softcap, z, scale)):
        torch.testing.assert_close(torch.as_tensor(got), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_split_vocabulary_gives_the_same_loss_and_gradients(world_size: int) -> None:
    """On four ranks the last one holds nothing but padding."""
    results = run_on_ranks(chunked, world_size, 3.0, 1e-2, 0.5, 2**12)
    total, hidden_grad, weight_grad = plain(3.0, 1e-2, 0.5)
    for rank, (got, grad, shard_grad) in enumerate(results):
        assert got == pytest.approx(total.item(), rel=1e-5)
        torch.testing.assert_close(torch.as_tensor(grad), hidden_grad, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(
            torch.as_tensor(shard_grad), weight_grad.chunk(world_size)[rank], rtol=2e-5, atol=2e-5
        )


def test_the_mean_is_taken_without_weights() -> None:
    hidden, weight, labels, _ = inputs()
    got = linear_cross_entropy(hidden, weight, labels, None, Projection(VOCAB))
    want = F.cross_entropy((hidden @ weight[:VOCAB].t()).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(got, want)
