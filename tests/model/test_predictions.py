"""What a model predicts: hits, divergences, at any split of the vocabulary and in any chunks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipeline.model import loss as loss_module
from pipeline.model.loss import Projection, linear_cross_entropy
from pipeline.model.predictions import divergences, score_labels
from tests.support.loss_inputs import PADDED, VOCAB, inputs
from tests.support.ranks import run_on_ranks


def tied_inputs() -> tuple[torch.Tensor, ...]:
    """As `inputs`, in whole numbers, whose sums no kernel rounds: equal logits are equal at every layout."""
    hidden, weight, _, weights = inputs()
    hidden, weight = (2 * hidden).round(), (2 * weight).round()
    # Equal at three ids in different quarters of the columns; for many tokens they are the largest.
    weight[[3, 40, 80]] = (30 * hidden.mean((0, 1))).round()
    logits = hidden @ weight[:VOCAB].t()
    labels = logits.argmax(-1)
    labels[:, ::5] += 1
    labels[(labels == 3) & (torch.arange(50) % 3 == 0)] = 40  # as likely as 3, and not the lowest
    return hidden, weight, labels % VOCAB, weights


def scored(softcap: float, scale: float, chunk_bytes: int) -> tuple[float, float, list[list[bool]]]:
    """Over the world's ranks: loss by both functions, hits."""
    loss_module.CHUNK_BYTES["cpu"] = chunk_bytes
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    hidden, weight, labels, weights = tied_inputs()
    shard = weight.chunk(size)[rank].clone()
    group = dist.group.WORLD if size > 1 else None
    projection = Projection(VOCAB, softcap, 0.0, scale, group)
    loss, hits = score_labels(hidden, shard, labels, weights, projection)
    other = linear_cross_entropy(hidden, shard, labels, weights, projection)
    return loss.item(), other.item(), hits.tolist()


def test_hits_are_those_of_a_greedy_choice_at_any_split_of_the_vocabulary() -> None:
    """Ties go to the lowest id, wherever the columns lie; padding is never chosen."""
    hidden, weight, labels, _ = tied_inputs()
    expected = (hidden @ weight[:VOCAB].t()).argmax(-1) == labels
    ties = (labels == 40) & ~expected
    assert 20 < int(expected.sum()) < 140 and int(ties.sum()) > 2 and int((expected & (labels == 3)).sum()) > 2  # fmt: skip
    for world_size, results in (
        (1, [scored(0.0, 1.0, 2**30)]),
        (1, [scored(0.0, 1.0, 2**10)]),
        (2, run_on_ranks(scored, 2, 0.0, 1.0, 2**12)),
        (4, run_on_ranks(scored, 4, 0.0, 1.0, 2**12)),
    ):
        for loss, other, hits in results:
            assert loss == other, world_size
            assert hits == expected.tolist(), world_size


@pytest.mark.parametrize(("softcap", "scale"), [(0.0, 1.0), (5.0, 0.5)])
def test_divergences_and_their_gradients_are_torchs(
    softcap: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded columns are in neither distribution; chunks do not show."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 4 * PADDED * 20)
    target, weight, _, weights = inputs()
    said = [target.roll(1, 0), 0.5 * target]
    sums, gradients = divergences(
        said, target, weight, weights, Projection(VOCAB, softcap, 0.0, scale)
    )

    def log_probabilities(hidden: torch.Tensor) -> torch.Tensor:
        logits = scale * (hidden @ weight[:VOCAB].t())
        return (softcap * torch.tanh(logits / softcap) if softcap else logits).log_softmax(-1)

    for number, hidden in enumerate(said):
        hidden.requires_grad_()
        apart = F.kl_div(
            log_probabilities(hidden), log_probabilities(target), log_target=True, reduction="none"
        )
        total = (apart.sum(-1) * weights).sum()
        total.backward()
        torch.testing.assert_close(sums[number], total.detach())
        torch.testing.assert_close(gradients[number], hidden.grad, rtol=1e-5, atol=1e-5)
