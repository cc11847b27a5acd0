"""Mixture of experts under tensor (with sequence) and pipeline parallelism: routing equals plain torch, router losses survive every layout."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.test_equivalence import compare
from tests.support.layouts import config, reference, train_all
from tests.support.ranks import run_on_ranks

LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [dict(), dict(zero=3)],
    2: [dict(tp=2, sp=True), dict(pp=2), dict(zero=2)],
}


@pytest.mark.parametrize("world_size", LAYOUTS)
@pytest.mark.parametrize(
    "model", ["moe", "moe-switch"], ids=["top-2 of 4 and a shared one", "top-1 of 4"]
)
def test_experts_match_plain_torch(world_size: int, model: str) -> None:
    configs = [config(model, **layout) for layout in LAYOUTS[world_size]]
    expected = reference(config(model))
    for layout, got in zip(
        LAYOUTS[world_size], run_on_ranks(train_all, world_size, configs, [{}] * len(configs))[0]
    ):
        compare(got, expected, "fp32", f"{model} {layout}")


ROUTER_LOSSES: dict[int, list[dict[str, Any]]] = {
    1: [dict(micro_batch_size=1, recompute="full")],
    2: [
        dict(lanes=4),
        dict(lanes=4, micro_batch_size=4),
        dict(tp=2, sp=True, micro_batch_size=4),
        dict(pp=2, micro_batch_size=1),
        dict(zero=1, precision="fp16"),
    ],
    4: [
        dict(tp=2, sp=True, lanes=4),
        dict(tp=2, sp=True, pp=2, micro_batch_size=4),
    ],
}


@pytest.mark.parametrize("world_size", ROUTER_LOSSES)
def test_router_losses_match_plain_torch(world_size: int) -> None:
    """They ride on the activations past the engine's loss scaling; a wrong scale shows in the gradient norm.

    Balance is counted within a sequence: which sequences share a micro-batch (its size, the lanes) changes nothing.
    """
    layouts = ROUTER_LOSSES[world_size]
    expected, without = reference(config("moe-aux")), reference(config("moe-unbalanced"))
    assert abs(expected[0][1] / without[0][1] - 1) > 1e-3, "the router losses changed nothing"
    configs = [config("moe-aux", **layout) for layout in layouts]
    results = run_on_ranks(train_all, world_size, configs, [{}] * len(configs))[0]
    for layout, got in zip(layouts, results):
        compare(got, expected, layout.get("precision", "fp32"), f"moe-aux {layout}")
