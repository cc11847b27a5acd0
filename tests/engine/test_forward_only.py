"""Evaluation, at any layout and with any number of micro-batches; training never knows of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.test_engine import engine_of
from tests.support.checkpoint_runs import Run
from tests.support.layouts import batches, config, rank_batches, reset_parallel_state
from tests.support.ranks import run_on_ranks

Case = dict[str, Any]
GROUPS = (1, 3, 8)
"""Micro-batches of an evaluation; a step has 8, DualPipeV wants at least 4 of them."""

LAYOUTS: dict[int, list[Case]] = {
    2: [dict(pp=2), dict(pp=2, schedule="dualpipev"), dict(tp=2, sp=True), dict(model="gpt2")],
    4: [dict(pp=4), dict(pp=2, tp=2, sp=True), dict(pp=2, tp=2, schedule="dualpipev")],
}


def evaluated(cases: list[Case]) -> list[list[float]]:
    """Mean losses of groups of other sizes than a step's, before, between and after two steps."""
    found = []
    for case in cases:
        engine = engine_of(config(**case))
        steps = [rank_batches(step, engine.shape, engine.layout) for step in batches(masked=True)]
        sizes = [max(1, size // engine.shape.sizes.data) for size in GROUPS]
        losses = []
        for number in range(3):
            for size in sizes:
                total, count = engine.evaluate(steps[5][:size])
                losses.append(float(total / count))
            engine.train_step(steps[number], step=number)
        found.append(losses)
        reset_parallel_state()
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_group_of_any_size_is_evaluated_alike_at_every_layout(world_size: int) -> None:
    """DeepSpeed's DualPipeV looks buffers up by the micro-batches of training, also in evaluation."""
    [[expected]] = run_on_ranks(evaluated, 1, [{}])
    layouts = LAYOUTS[world_size]
    by_rank = run_on_ranks(evaluated, world_size, layouts)
    assert all(found == by_rank[0] for found in by_rank)
    for case, losses in zip(layouts, by_rank[0]):
        # Two copies of the model take the first and the ninth sequence for the smallest group.
        is_comparable = slice(None) if "pp" in case or "tp" in case else slice(2, None, 3)
        assert losses[is_comparable] == pytest.approx(expected[is_comparable], rel=1e-5), case


DROPOUT: dict[int, list[Case]] = {
    1: [dict(zero=0), dict(model="modern", zero=1, precision="bf16"), dict(model="moe-aux")],
    2: [dict(zero=3), dict(pp=2), dict(pp=2, schedule="dualpipev"), dict(model="modern", tp=2, sp=True)],
}  # fmt: skip


def histories(cases: list[Case], folder: Path) -> list[list[Any]]:
    """Four steps with dropout: alone, with an evaluation before each, and resumed after two."""
    found = []
    for index, case in enumerate(cases):
        runs = []
        for evaluates in (False, True):
            run = Run(config(dropout=0.2, **case), folder / f"{index}-{evaluates}")
            held_out = rank_batches(run.steps[9], run.shape, run.layout)[:3]
            modes = [module.training for module in run.engine.runner.module.modules()]
            history = []
            for step in range(4):
                if evaluates:
                    run.engine.evaluate(held_out)
                    state = torch.get_rng_state()
                    run.engine.evaluate(held_out)
                    assert torch.equal(state, torch.get_rng_state())
                    assert modes == [m.training for m in run.engine.runner.module.modules()]
                history += run.train(step, step + 1)
                if step == 1:
                    run.save(2)
            run.close()
            runs.append(history)
            again = Run(config(dropout=0.2, **case), folder / f"{index}-{evaluates}")
            again.checkpointer.restore(again.engine)
            if evaluates:
                again.engine.evaluate(held_out)
            runs.append(history[:2] + again.train(2, 4))
            again.close()
        found.append(runs)
    return found


@pytest.mark.parametrize("world_size", DROPOUT)
def test_training_with_dropout_does_not_know_of_evaluations(
    world_size: int, tmp_path: Path
) -> None:
    """After one the plain engine went on without dropout: its train() asked DeepSpeed's own flag."""
    for ranks in run_on_ranks(histories, world_size, DROPOUT[world_size], tmp_path):
        for case, (alone, *others) in zip(DROPOUT[world_size], ranks):
            assert all(other == alone for other in others), case
