"""Mixture of experts under tensor (with sequence) and pipeline parallelism: routing equals plain torch, router losses survive every layout."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.support.equivalence import Case, check, compare
from tests.support.layouts import (
    BATCH,
    FEW_STEPS,
    SEQ_LEN,
    batches,
    config,
    reference,
    train,
    train_all,
)
from tests.support.ranks import run_on_ranks
from tests.support.unwritten import with_nan_memory

SPREAD: dict[int, list[dict[str, Any]]] = {
    2: [
        dict(ep=2, zero=0),
        dict(ep=2),
        dict(ep=2, zero=2),
        dict(ep=2, precision="bf16"),
        dict(ep=2, zero=2, precision="fp16"),
        dict(ep=2, recompute="full", micro_batch_size=4),
        dict(ep=2, tp=2, sp=True, zero=3),
        dict(ep=2, tp=2, sp=True, precision="bf16"),
    ],
    4: [
        dict(ep=4),
        dict(ep=4, zero=0, tp=2, sp=True),
        dict(ep=4, zero=2, tp=2, sp=True),
        dict(ep=4, tp=2, sp=True, precision="bf16"),
        dict(ep=2, zero=0),
        dict(ep=2, zero=2),
        dict(ep=2, precision="bf16"),
        dict(ep=2, tp=2, sp=True),
        dict(ep=2, pp=2),
        dict(ep=2, pp=2, schedule="dualpipev"),
        dict(ep=2, pp=2, precision="bf16"),
        dict(ep=2, cp=2, zero=2),
        dict(ep=4, cp=2, precision="bf16"),
        dict(ep=4, cp=2, tp=2, sp=True),
    ],
}
"""World size to layouts of experts on ranks of their own: EP2 x DP4 has two copies of each, EP4 over
TP2 x DP2 experts of tensor rank 1 that data-parallel ranks hold different ones of."""


def check_spread(world_size: int, layouts: list[dict[str, Any]]) -> None:
    """Router losses on, a shared expert, clipping: against one process of plain torch; ranks agree bitwise.

    Every token of every layer was counted once, evaluated or recomputed ones not, and sent to two experts.
    """
    found = check(world_size, [dict(model="moe-whole", **layout) for layout in layouts])
    exact = next(got for layout, got in zip(layouts, found) if "precision" not in layout)
    for got in found:
        compare_first_norm(got, exact["history"])
    tokens = FEW_STEPS * BATCH * SEQ_LEN
    for layout, got in zip(layouts, found):
        for *counts, entropy, rows in got["routing"]:
            assert (sum(counts), rows) == (2 * tokens, tokens), layout
            assert 0 < entropy / tokens <= math.log(4) + 1e-6, layout


def test_expert_parallelism_matches_plain_torch() -> None:
    """Four experts on four ranks of two tensor-parallel groups: what each of DeepSpeed's norms and means leaves out."""
    check_spread(4, [dict(ep=4, tp=2, sp=True, precision="bf16"), dict(ep=2, zero=2)])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", SPREAD)
def test_every_expert_parallel_layout_matches_plain_torch(world_size: int) -> None:
    """The promise of the project, of experts."""
    check_spread(world_size, SPREAD[world_size])


def compare_first_norm(got: dict[str, Any], expected: list[tuple[float, float]]) -> None:
    """Closer than ten steps of bf16 allow: a factor of two on the experts' gradients is 1.3 % of this norm."""
    have, want = got["history"][0][1], expected[0][1]
    assert have == pytest.approx(want, rel=5e-3), f"grad_norm of step 0 differs: {have}, {want}"


SABOTAGES = {
    "a norm without the experts of tensor ranks above 0": dict(ep=4, tp=2, sp=True),
    "a mean over the copies of an expert": dict(ep=2, precision="bf16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_sabotaged_experts_turn_the_comparison_red(sabotage: str) -> None:
    """Each is seen by one layout alone: the first not without tensor ranks, the second not without several copies."""
    layout = SABOTAGES[sabotage]
    got = run_on_ranks(train_sabotaged, 4, config("moe-whole", **layout), sabotage)[0]
    expected = reference(config("moe-whole"), num_steps=FEW_STEPS)
    with pytest.raises(AssertionError, match="grad_norm of step 0 differs"):
        compare(got, expected, layout.get("precision", "fp32"), sabotage)
        compare_first_norm(got, expected)


def train_sabotaged(cfg: Any, sabotage: str) -> dict[str, Any]:
    """A run with one part of the engine broken."""
    from pipeline.engine.deepspeed import changes, plain
    from pipeline.model.partition import is_split

    class MeanOverCopies(plain.Reduction):
        def finish(self) -> None:
            super().finish()
            for bucket in self.buckets:
                bucket.sums.mul_(self.group.size() / bucket.copies.size())

    if sabotage == "a mean over the copies of an expert":
        plain.Reduction = MeanOverCopies
    else:
        changes._counts_here = lambda parameter, rank: rank == 0 or is_split(parameter)
    return train(cfg, batches()[:FEW_STEPS])


LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [dict(), dict(zero=3)],
    2: [dict(tp=2, sp=True), dict(pp=2), dict(zero=2)],
}


AMONG_OTHERS: list[Case] = [
    dict(model="moe-switch", tp=2, sp=True, ep=2, zero=3, recompute="selective", documents=True),
]


@pytest.mark.slow
def test_the_chosen_expert_beside_what_else_there_is() -> None:
    """On ranks of its own, its weights gathered, its block recomputed, its tokens in documents."""
    check(4, AMONG_OTHERS)


@pytest.mark.parametrize("world_size", LAYOUTS)
@pytest.mark.parametrize(
    "model",
    [
        pytest.param("moe", id="top-2 of 4 and a shared one"),
        pytest.param("moe-switch", id="top-1 of 4", marks=pytest.mark.slow),
    ],
)
def test_experts_match_plain_torch(world_size: int, model: str) -> None:
    configs = [config(model, **layout) for layout in LAYOUTS[world_size]]
    expected = reference(config(model), num_steps=FEW_STEPS)
    for layout, got in zip(
        LAYOUTS[world_size],
        run_on_ranks(
            with_nan_memory, world_size, train_all, configs, [{}] * len(configs), FEW_STEPS
        )[0],
    ):
        compare(got, expected, "fp32", f"{model} {layout}")


ROUTER_LOSSES: dict[int, list[dict[str, Any]]] = {
    1: [
        dict(micro_batch_size=1, recompute="full"),
        dict(lanes=4),
        dict(lanes=4, micro_batch_size=4),
    ],
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


@pytest.mark.parametrize(
    "world_size", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))]
)
def test_router_losses_match_plain_torch(world_size: int) -> None:
    """They ride on the activations past the engine's loss scaling; a wrong scale shows in the gradient norm.

    Balance is counted within a sequence: which sequences share a micro-batch (its size, the lanes) changes nothing.
    """
    layouts = ROUTER_LOSSES[world_size]
    expected = reference(config("moe-aux"), num_steps=FEW_STEPS)
    without = reference(config("moe-unbalanced"), num_steps=1)
    assert abs(expected[0][1] / without[0][1] - 1) > 1e-3, "the router losses changed nothing"
    configs = [config("moe-aux", **layout) for layout in layouts]
    results = run_on_ranks(train_all, world_size, configs, [{}] * len(configs), FEW_STEPS)[0]
    for layout, got in zip(layouts, results):
        compare(got, expected, layout.get("precision", "fp32"), f"moe-aux {layout}")
