"""Evaluation, at any layout and with any number of micro-batches; training never knows of it."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.test_engine import engine_of
from tests.support.checkpoint_runs import Run
from tests.support.layouts import (
    allow_fp16_on_the_cpu,
    batches,
    config,
    rank_batches,
    reset_parallel_state,
)
from tests.support.ranks import run_on_ranks
from tests.support.unwritten import with_nan_memory

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
                scores = engine.evaluate(steps[5][:size])
                losses.append(float(scores.nats / scores.tokens))
            engine.train_step(steps[number], step=number)
        found.append(losses)
        reset_parallel_state()
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_group_of_any_size_is_evaluated_alike_at_every_layout(world_size: int) -> None:
    """DeepSpeed's DualPipeV looks buffers up by the micro-batches of training, also in evaluation."""
    [[expected]] = run_on_ranks(evaluated, 1, [{}])
    layouts = LAYOUTS[world_size]
    by_rank = run_on_ranks(with_nan_memory, world_size, evaluated, layouts)
    assert all(found == by_rank[0] for found in by_rank)
    for case, losses in zip(layouts, by_rank[0]):
        # Two copies of the model take the first and the ninth sequence for the smallest group.
        is_comparable = slice(None) if "pp" in case or "tp" in case else slice(2, None, 3)
        assert losses[is_comparable] == pytest.approx(expected[is_comparable], rel=1e-5), case


DROPOUT: list[tuple[int, list[Case]]] = [
    (2, [dict(zero=3), dict(pp=2, schedule="dualpipev")]),
]
MORE_DROPOUT: list[tuple[int, list[Case]]] = [
    (1, [dict(zero=0), dict(model="modern", zero=1, precision="bf16")]),
    (1, [dict(model="moe-aux"), dict(precision="fp16", zero=1)]),
    (2, [dict(pp=2), dict(model="modern", tp=2, sp=True), dict(zero=2), dict(cp=2)]),
]


def histories(cases: list[Case], folder: Path) -> list[list[Any]]:
    """Four steps with dropout: alone, with an evaluation before each, and resumed after two."""
    allow_fp16_on_the_cpu()
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
                    run.engine.evaluate(held_out, answers=True)
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
                again.engine.evaluate(held_out, answers=True)
            runs.append(history[:2] + again.train(2, 4))
            again.close()
        found.append(runs)
    return found


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [*DROPOUT, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE_DROPOUT)],
)
def test_training_with_dropout_does_not_know_of_evaluations(
    world_size: int, cases: list[Case], tmp_path: Path
) -> None:
    """After one the plain engine went on without dropout: its train() asked DeepSpeed's own flag."""
    for ranks in run_on_ranks(histories, world_size, cases, tmp_path):
        for case, (alone, *others) in zip(cases, ranks):
            assert all(other == alone for other in others), case


def numbers(scores: Any) -> list[float]:
    return [float(value) for value in vars(scores).values()]


def with_answers() -> list[dict[str, torch.Tensor]]:
    """Steps whose labels are mostly 7, which a model learns at once; answers of two labels, or of three at a row's end."""
    generator = torch.Generator().manual_seed(5)
    steps = batches(masked=True, documents=True)
    for step in steps:
        is_seven = torch.rand(step["labels"].shape, generator=generator) < 0.7
        step["labels"] = torch.where(is_seven, 7, step["labels"])
        step["mask"] = (
            (torch.arange(step["labels"].shape[1]) % 4 % 3 > 0).float().expand_as(is_seven).clone()
        )
        step["mask"][:, -3:] = 1.0
        step["mask"][1] = 0.0  # what only fills the last batch holds no answer
    return steps


def exact_answers(cases: list[Case]) -> list[list[float]]:
    """nats, tokens, exact answers and answers after some steps: of the engine, of a model that is only asked."""
    found = []
    for case in cases:
        engine = engine_of(config(documents=True, **case))
        steps = [rank_batches(step, engine.shape, engine.layout) for step in with_answers()]
        for number in range(6):
            engine.train_step(steps[number], step=number)
        found.append(numbers(engine.evaluate(steps[7], answers=True)))
        reset_parallel_state()
    return found


EXACT: list[Case] = [
    dict(tp=2, sp=True),
    dict(pp=2),
    dict(pp=2, schedule="dualpipev"),
    dict(zero=3),
]


@pytest.mark.slow  # 36 s each
@pytest.mark.parametrize("model", ["gpt2", "modern"])
def test_exact_answers_are_counted_alike_at_every_layout(model: str) -> None:
    """A vocabulary in parts, stages that see no logits, ranks with a part of the batch: one number."""
    [[(_, tokens, exact, answers)]] = run_on_ranks(exact_answers, 1, [dict(model=model)])
    mask = with_answers()[7]["mask"]
    runs = int((mask[:, 0] + (mask[:, 1:] * (1 - mask[:, :-1])).sum(1)).sum())
    assert (tokens, answers) == (mask.sum(), runs)
    assert 0.2 * answers < exact < 0.8 * answers
    cases = [dict(model=model, **case) for case in EXACT]
    for ranks in run_on_ranks(with_nan_memory, 2, exact_answers, cases):
        for case, found in zip(EXACT, ranks):
            assert found[1:] == [tokens, exact, answers], case


def asked(case: Case) -> dict[str, Any]:
    """What a fresh model answers that is only asked, and what the engine that trains answers."""
    from pipeline.engine.forward_only import ForwardOnly
    from pipeline.model.stage_io import StageSchema

    cfg = config(**case)
    engine = engine_of(cfg)
    parts = rank_batches(batches(masked=True)[0], engine.shape, engine.layout)
    trainer = numbers(engine.evaluate(parts, answers=True))
    layout, architecture, seq_len = engine.layout, engine.architecture, engine.shape.seq_len
    del engine
    gc.collect()
    before = living_bytes()
    schema = StageSchema.of(cfg.data, cfg.parallel, cfg.model)
    model = ForwardOnly(architecture, schema, layout, seq_len=seq_len, seed=cfg.seed)
    answer = numbers(model.evaluate(parts, answers=True))
    hidden = model.hidden_states(parts[:2], layer=2)
    shapes = [tuple(h.shape) for h in hidden]
    sums = [float(h.float().abs().sum()) for h in hidden]
    del hidden
    weights = sum(p.nbytes for p, _ in model.all_parameters().values())
    reset_parallel_state()
    return {
        "trainer": trainer,
        "answer": answer,
        "shapes": shapes,
        "sums": sums,
        "extra": (living_bytes() - before) / weights,
    }


@pytest.mark.slow
def test_spread_experts_answer_like_those_of_one_process() -> None:
    """At the trainer and where a model is only asked; every rank takes as many batches, or the others would wait."""
    [alone] = run_on_ranks(asked, 1, dict(model="moe-whole"))
    for case, world_size in (
        (dict(ep=2), 2),
        (dict(ep=2, pp=2), 4),
        (dict(ep=4, tp=2, sp=True), 4),
    ):
        for rank in run_on_ranks(
            with_nan_memory, world_size, asked, dict(model="moe-whole", **case)
        ):
            assert rank["answer"] == pytest.approx(rank["trainer"], rel=1e-6), case
            assert rank["answer"] == pytest.approx(alone["answer"], rel=1e-6), case


def held(cases: list[Case]) -> list[dict[str, int]]:
    """Bytes of all tensors after a step, after an evaluation, and after a step that followed it."""
    found = []
    for case in cases:
        engine = engine_of(config(**case))
        steps = [rank_batches(step, engine.shape, engine.layout) for step in batches(masked=True)]
        sizes = [max(1, size // engine.shape.sizes.data) for size in GROUPS]

        def evaluate(engine: Any = engine, steps: Any = steps, sizes: Any = sizes) -> int:
            for size in sizes:
                engine.evaluate(steps[5][:size])
            return living_bytes(floats_only=False)

        def train(number: int, engine: Any = engine, steps: Any = steps) -> int:
            engine.train_step(steps[number], step=number)
            return living_bytes(floats_only=False)

        train(0), evaluate()  # what is made at first use
        found.append({"step": train(1), "evaluation": evaluate(), "next step": train(2)})
        reset_parallel_state()
    return found


HOLDING: list[Case] = [
    dict(pp=2), dict(pp=2, schedule="dualpipev"), dict(tp=2, sp=True), dict(cp=2),
    dict(zero=2, precision="bf16"), dict(zero=3),
]  # fmt: skip


@pytest.mark.slow
def test_an_evaluation_keeps_no_memory() -> None:
    """Not a tensor more than before it, at every engine and schedule: a run of a thousand evaluations does not grow."""
    for rank in run_on_ranks(held, 2, HOLDING):
        for case, sizes in zip(HOLDING, rank, strict=True):
            assert sizes["step"] == sizes["evaluation"] == sizes["next step"] > 0, (case, sizes)


def living_bytes(*, floats_only: bool = True) -> int:
    """Bytes of all (floating-point) tensors of this process that stay, each memory once.

    Once five looks in a row agree: a thread of gloo holds what it has reduced a moment longer than wait().
    """
    seen = []
    while len(seen) < 5 or len(set(seen[-5:])) > 1:
        gc.collect()
        found = {}
        for item in gc.get_objects():
            if issubclass(type(item), torch.Tensor) and (
                item.is_floating_point() or not floats_only
            ):
                storage = item.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
        seen.append(sum(found.values()))
        time.sleep(0.05)
    return seen[-1]


@pytest.mark.slow
def test_a_model_that_is_only_asked_answers_like_the_trainer() -> None:
    """Without optimizer, moments or fp32 copies: it holds its weights, once, and nothing else."""
    [alone] = run_on_ranks(asked, 1, {})
    for case in (dict(precision="bf16"), dict(tp=2, sp=True), dict(pp=2)):
        ranks = run_on_ranks(with_nan_memory, 1 if "precision" in case else 2, asked, case)
        for rank in ranks:
            assert rank["answer"] == pytest.approx(rank["trainer"], rel=1e-6), case
            assert rank["extra"] < 1.05, case
        assert ranks[0]["answer"] == pytest.approx(
            alone["answer"], rel=1e-3 if "precision" in case else 1e-6
        )
        shown = [rank for rank in ranks if rank["shapes"]]
        assert len(shown) == (1 if "pp" in case else len(ranks))
        for rank in shown:
            assert rank["shapes"] == alone["shapes"] == [(2, 32, 64)] * 2
            assert rank["sums"] == pytest.approx(
                alone["sums"], rel=1e-2 if "precision" in case else 1e-5
            )
