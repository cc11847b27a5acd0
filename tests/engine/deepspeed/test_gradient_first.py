"""Gradients of inputs leave before those of weights are computed, in both schedules, and nothing is left undone.

That the numbers are right at every layout is shown where they always were: tests/engine/test_equivalence.py,
tests/model/test_lora.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.test_engine import engine_of
from tests.support.equivalence import compare
from tests.support.layouts import (
    FEW_STEPS,
    batches,
    config,
    rank_batches,
    reference,
    reset_parallel_state,
    train,
)
from tests.support.ranks import run_on_ranks


class Waiting:
    """Of LateProducts what the instructions ask for."""

    def __init__(self, heard: list[str]) -> None:
        self.heard = heard

    def work_off(self) -> None:
        self.heard.append("weights")


def order_under_1f1b() -> dict[str, list[str]]:
    """Changed instruction -> what happens in it."""
    from deepspeed.runtime.pipe import schedule

    from pipeline.engine.deepspeed import gradient_first

    found, late = {}, Waiting([])
    send = schedule.SendGrad
    engine: Any = SimpleNamespace(
        _INSTRUCTION_MAP={send: lambda _, **__: late.heard.append(send.__name__)}
    )
    waiting: Any = late
    for kind, instruction in gradient_first._instructions(engine, waiting).items():
        late.heard.clear()
        instruction(engine, buffer_id=0)
        found[kind.__name__] = list(late.heard)
    return found


def order_under_dualpipev(messages: list[str]) -> list[str]:
    """What happens where messages are exchanged."""
    from deepspeed.runtime.pipe import dualpipev, schedule

    from pipeline.engine.deepspeed import gradient_first

    late: Any = Waiting([])
    work = SimpleNamespace(wait=lambda: late.heard.append("wait"))
    dualpipev.dist = SimpleNamespace(
        batch_isend_irecv=lambda _: late.heard.append("launch") or [work]
    )
    engine = SimpleNamespace(_p2p_ops=messages)
    gradient_first._dual_instructions(late)[schedule.CommitP2P](engine)
    assert engine._p2p_ops == []
    return late.heard


def orders() -> list[Any]:
    return [
        order_under_1f1b(),
        order_under_dualpipev(["one"]),
        order_under_dualpipev([]),
    ]


def test_weights_are_computed_behind_the_send_and_before_the_wait() -> None:
    others, exchange, nothing = run_on_ranks(orders, 1)[0]
    assert others == {"SendGrad": ["SendGrad", "weights"]}
    assert exchange == ["launch", "weights", "wait"] and nothing == ["weights"]


def left_behind(cfgs: list[Any]) -> list[tuple[int, int]]:
    """(products that waited at once at most, products that wait after a step) of each layout."""
    found = []
    for cfg in cfgs:
        engine, most = engine_of(cfg), [0]
        late = engine.runner.late
        work_off = late.work_off

        def counted(late: Any = late, most: list[int] = most, work_off: Any = work_off) -> None:
            most[0] = max(most[0], len(late))
            work_off()

        late.work_off = counted
        engine.train_step(rank_batches(batches()[0], engine.shape, engine.layout), step=0)
        found.append((most[0], len(late)))
        reset_parallel_state()
    return found


def test_no_product_waits_after_a_step() -> None:
    """And a micro-batch leaves those of its stage: two blocks of four linears, under DualPipeV one.

    1F1B's first stage sends nothing, and leaves nothing.
    """
    cfgs = [config("gpt2", pp=2), config("gpt2", pp=2, schedule="dualpipev")]
    first, second = run_on_ranks(left_behind, 2, cfgs)
    assert [left for _, left in first + second] == [0, 0, 0, 0]
    assert first[0][0] == 0 and min(first[1][0], second[0][0], second[1][0]) >= 4


@pytest.mark.slow
def test_waiting_on_the_first_stage_turns_the_comparison_red() -> None:
    """1F1B receives into the buffer that the products still read: the norm was 11 % wrong, the first loss right."""
    cfg = config("gpt2", pp=2)
    history = run_on_ranks(train_with_a_first_stage_that_waits, 2, cfg)[0]["history"]
    expected = reference(cfg, num_steps=FEW_STEPS)
    assert history[0][0] == pytest.approx(expected[0][0], rel=1e-5)
    with pytest.raises(AssertionError, match="grad_norm of step 0 differs"):
        compare({"history": history}, expected, "fp32", "sabotage")


def train_with_a_first_stage_that_waits(cfg: Any) -> dict[str, Any]:
    from pipeline.engine.deepspeed import gradient_first

    gradient_first._sends = lambda engine: True
    return train(cfg, batches()[:FEW_STEPS])
