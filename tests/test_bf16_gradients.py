"""Sparing passes over the gradient sums changes no number, also where an expert gets no gradient in a step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.distributed import run_on_ranks
from tests.layouts import batches, config, train


def histories(model: str) -> list[list[tuple[float, float]]]:
    """The same run with our sums and with DeepSpeed's own."""
    from pipeline import bf16_gradients

    cfg = config(model, precision="bf16")
    if cfg.model.moe.num_experts:  # more experts than a micro-batch's tokens can fill
        moe = replace(cfg.model.moe, num_experts=64, top_k=1)
        cfg = replace(cfg, model=replace(cfg.model, moe=moe))
    spared, found = [], []
    ours = bf16_gradients.spare_passes
    for change in (lambda optimizer: spared.append(ours(optimizer)), lambda optimizer: None):
        bf16_gradients.spare_passes = change
        found.append(train(cfg, batches()[:6])["history"])
    assert len(spared) == 1
    return found


@pytest.mark.parametrize("model", ["gpt2", "moe"])
def test_losses_and_norms_are_deepspeeds_own(model: str) -> None:
    for found, expected in run_on_ranks(histories, 2, model):
        assert found == expected
