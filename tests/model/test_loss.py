"""Output projection and cross entropy in chunks against torch's own, value and gradients."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from pipeline.model import fused_loss
from pipeline.model.loss import Projection, linear_cross_entropy
from tests.support.loss_inputs import OPTIONS, VOCAB, chunked, inputs, plain
from tests.support.ranks import run_on_ranks


def both(*given: Any) -> list[list[Any]]:
    """`chunked` by loss.py's operators, and by the arithmetic that fused_loss.py compiles."""
    with mock.patch.object(fused_loss, "compiled", side_effect=lambda function: function):
        return [chunked(*given), chunked(*given, True)]


@pytest.mark.parametrize("softcap, z, scale", OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [2**10, 2**30])
def test_chunks_equal_torch_on_one_rank(
    softcap: float, z: float, scale: float, chunk_bytes: int
) -> None:
    """Padding columns count for nothing, and a chunk's size changes nothing."""
    for found in both(softcap, z, scale, chunk_bytes):
        for got, want in zip(found, plain(softcap, z, scale), strict=True):
            torch.testing.assert_close(torch.as_tensor(got), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_split_vocabulary_gives_the_same_loss_and_gradients(world_size: int) -> None:
    """On four ranks the last one holds nothing but padding."""
    results = run_on_ranks(both, world_size, 3.0, 1e-2, 0.5, 2**12)
    total, hidden_grad, weight_grad = plain(3.0, 1e-2, 0.5)
    for rank, found in enumerate(results):
        for got, grad, shard_grad in found:
            assert got == pytest.approx(total.item(), rel=1e-5)
            torch.testing.assert_close(torch.as_tensor(grad), hidden_grad, rtol=2e-5, atol=2e-5)
            torch.testing.assert_close(
                torch.as_tensor(shard_grad),
                weight_grad.chunk(world_size)[rank],
                rtol=2e-5,
                atol=2e-5,
            )


def test_the_mean_is_taken_without_weights() -> None:
    hidden, weight, labels, _ = inputs()
    got = linear_cross_entropy(hidden, weight, labels, None, Projection(VOCAB))
    want = F.cross_entropy((hidden @ weight[:VOCAB].t()).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(got, want)
