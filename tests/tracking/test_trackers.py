"""What a run tells all of its trackers, through Metrics."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config.choices import WandbMode, XAxis
from pipeline.config.operation import TrackingConfig
from pipeline.tracking import metrics
from pipeline.tracking.samples import Sample
from pipeline.tracking.tensorboard_run import TensorboardRun
from pipeline.tracking.trackers import trackers_of
from pipeline.tracking.wandb_run import WandbRun
from tests.support.trackers import Memory
from tests.tracking.test_metrics import State, make, train


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Memory:
    made = Memory(tmp_path, takes_back=True)
    monkeypatch.setattr(metrics, "trackers_of", lambda *_, **__: [made])
    return made


def evaluate(tracker: metrics.Metrics, state: State, loss: float) -> None:
    result = SimpleNamespace(loss=loss, ppl=1.0, bits_per_byte=1.0, exact=None, tokens=10)
    tracker.record_eval(state, {"wiki": result})


def test_a_run_of_two_starts_is_one_series_with_its_best_and_its_last(
    tmp_path: Path, memory: Memory
) -> None:
    """Killed after step 10, back at step 7, done at step 20: each logged step once."""
    tracker, state = make(tmp_path, log_every=1), State()
    train(tracker, state, 5)
    evaluate(tracker, state, 2.0)
    train(tracker, state, 5)
    tracker.record_samples(state, [Sample("a", "b")])
    tracker.close(1)
    state = State(step=7, tokens_seen=7 * 32)
    tracker = make(tmp_path, state=state, log_every=1)
    train(tracker, state, 13)
    evaluate(tracker, state, 3.0)
    tracker.finish(state)
    tracker.close()
    assert [step for step, _ in memory.points["train/loss"]] == list(range(1, 21))
    assert memory.points["val/wiki/loss"] == [(5, 2.0), (20, 3.0)]
    assert memory.samples == [(10, [Sample("a", "b")])]
    assert memory.summary == {
        "best/loss": 2.0, "best/step": 5, "best/tokens": 160, "final/step": 20, "final/tokens": 640,
        "final/wiki/loss": 3.0, "final/wiki/ppl": 1.0, "final/wiki/bits_per_byte": 1.0, "final/wiki/tokens": 10.0,
    }  # fmt: skip


def test_a_rollback_takes_points_and_the_best_back(tmp_path: Path, memory: Memory) -> None:
    tracker, state = make(tmp_path, log_every=1), State()
    train(tracker, state, 2)
    evaluate(tracker, state, 2.0)
    train(tracker, state, 3)
    evaluate(tracker, state, 1.0)
    state.step, state.tokens_seen = 3, 96
    tracker.undo(state)
    train(tracker, state, 4)
    tracker.close()
    assert [step for step, _ in memory.points["train/loss"]] == list(range(1, 8))
    assert memory.points["val/wiki/loss"] == [(2, 2.0)]
    assert (memory.summary["best/loss"], memory.summary["best/step"]) == (2.0, 2)


def test_a_rollback_before_the_only_evaluation_leaves_no_best(
    tmp_path: Path, memory: Memory
) -> None:
    """The weights that it was of are gone; of a run without evaluations nothing is said."""
    tracker, state = make(tmp_path, log_every=1), State()
    train(tracker, state, 2)
    tracker.undo(State(step=1, tokens_seen=32))
    evaluate(tracker, state, 2.0)
    state.step, state.tokens_seen = 1, 32
    tracker.undo(state)
    tracker.close()
    assert memory.summary == {"best/loss": None, "best/step": None, "best/tokens": None}
    assert memory.summaries == 2


def test_settings_choose_the_trackers_and_neither_is_shown_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-value")
    config = {"data": {"path": "https://me:word@host/x"}, "note": "it is planted-value"}
    off = {"wandb": WandbMode.disabled}
    assert trackers_of(TrackingConfig(**off), run_dir=tmp_path, config=config) == []
    both = TrackingConfig(wandb=WandbMode.offline, tensorboard=True, x_axis=XAxis.tokens)
    made = trackers_of(both, run_dir=tmp_path, config=config)
    assert [type(one) for one in made] == [WandbRun, TensorboardRun]
    for one in made:
        shown = json.dumps(one._config)
        assert "planted-value" not in shown and "word" not in shown and "host" in shown
