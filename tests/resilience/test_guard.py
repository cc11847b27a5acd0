"""Bad numbers and spikes: judged alike on every rank and on every replay."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.choices import OnSpike
from pipeline.config.operation import ResilienceConfig
from pipeline.resilience.guard import LOSS_SCALE_HALVINGS, MAX_ROLLBACKS, Guard
from pipeline.resilience.step_agreement import StepSummary


def guard(policy: str = "none", *, loss_scaling: bool = False, **settings) -> Guard:
    settings = {"spike_window": 8, "max_bad_steps": 3, **settings}
    return Guard(ResilienceConfig(on_spike=OnSpike[policy], **settings), loss_scaling=loss_scaling)


def feed(judge: Guard, losses: list[float], start: int = 0, grad_norm: float = 1.0) -> list[str]:
    summaries = [
        StepSummary(start + i, loss, grad_norm, not math.isfinite(loss), False)
        for i, loss in enumerate(losses)
    ]
    return [judge.judge(summary).name for summary in summaries]


STEADY = [3.0, 3.1, 2.9, 3.05, 2.95, 3.0, 3.1, 2.9]


def test_training_stops_after_the_set_number_of_bad_steps_in_a_row():
    judge = guard()
    assert feed(judge, [math.nan, math.nan, 3.0, math.nan, math.inf, math.nan]) == [
        "continue_"
    ] * 5 + ["stop"]
    assert [(e.step, e.action) for e in judge.ledger] == [
        (0, "skip"),
        (1, "skip"),
        (3, "skip"),
        (4, "skip"),
        (5, "stop"),
    ]
    assert "3 steps in a row" in judge.report() and "step 5: bad_numbers, stop" in judge.report()


def test_a_gradient_overflow_is_bad_unless_a_loss_scale_is_being_found():
    overflow = StepSummary(0, 3.0, math.nan, True, False)
    for loss_scaling, entries in ((False, 1), (True, 0)):
        judge = guard(loss_scaling=loss_scaling)
        judge.judge(overflow)
        assert len(judge.ledger) == entries


def test_overflows_that_no_loss_scale_explains_are_bad_numbers():
    """Broken gradients overflow at every scale; the run must not go on for ever without an update."""
    judge = guard(loss_scaling=True, max_bad_steps=2)
    actions = feed(judge, [3.0] * (LOSS_SCALE_HALVINGS + 2), grad_norm=math.inf)
    assert actions == ["continue_"] * (LOSS_SCALE_HALVINGS + 1) + ["stop"]
    assert [e.kind for e in judge.ledger] == ["bad_numbers"] * 2
    assert (
        feed(judge, [3.0], grad_norm=1.0) == ["continue_"]
        and judge.overflows_in_a_row == judge.bad_in_a_row == 0
    )


def test_limit_is_median_plus_robust_deviations():
    """Worked by hand: median 3, absolute deviations 0 .1 .1 .05 .05 0 .1 .1, their median .075."""
    judge = guard("skip", spike_sigmas=4.0)
    feed(judge, STEADY)
    assert judge.limit == pytest.approx(3.0 + 4.0 * 1.4826 * 0.075)
    assert judge.max_loss == judge.limit
    assert guard("rollback").max_loss == math.inf


def test_nothing_is_a_spike_before_half_the_window_is_known():
    assert feed(guard("rollback"), [3.0, 100.0, 3.0, 3.0]) == ["continue_"] * 4


@pytest.mark.parametrize(
    "policy, expected", [("none", "continue_"), ("skip", "continue_"), ("rollback", "rollback")]
)
def test_policy_decides_what_a_spike_does(policy, expected):
    judge = guard(policy)
    assert feed(judge, [*STEADY, 9.0])[-1] == expected
    assert [(e.kind, e.action) for e in judge.ledger] == {
        "none": [], "skip": [("spike", "skip")], "rollback": [("spike", "rollback")]
    }[policy]  # fmt: skip


def test_losses_are_kept_only_where_they_are_compared():
    """A checkpoint of a private run would tell them, and they have no noise."""
    for policy, kept in [("none", 0), ("skip", len(STEADY))]:
        judge = guard(policy)
        feed(judge, STEADY)
        assert len(judge.state()["history"]) == kept


def test_a_spike_does_not_raise_the_limit():
    judge = guard("skip")
    feed(judge, STEADY)
    before = judge.limit
    feed(judge, [9.0, 9.0])
    assert judge.limit == before


def test_rollbacks_to_one_checkpoint_are_limited():
    judge = guard("rollback")
    feed(judge, STEADY)
    saved = judge.state()
    for _ in range(MAX_ROLLBACKS):
        assert feed(judge, [9.0], start=8) == ["rollback"]
        judge.restore(saved, keep_ledger=True)
    assert feed(judge, [9.0], start=8) == ["stop"]
    assert "after 3 rollbacks" in judge.report()
    assert len(judge.ledger) == MAX_ROLLBACKS + 1


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0.1, 20.0) | st.just(math.nan), min_size=1, max_size=60), st.integers(0, 60)
)
def test_a_resumed_guard_judges_as_the_undisturbed_one(losses, cut):
    whole, first, second = guard("skip"), guard("skip"), guard("skip")
    expected = feed(whole, losses)
    actions = feed(first, losses[:cut])
    second.restore(first.state())
    assert actions + feed(second, losses[cut:], start=len(losses[:cut])) == expected
    assert second.state() == whole.state()
