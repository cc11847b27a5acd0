"""The phases of a process, and its signs of life."""

import pytest

from pipeline.resilience.clock import Clock


def test_time_belongs_to_the_phase_that_was_entered_before():
    clock = Clock()
    clock.enter("data", 0)
    clock.enter("train", 0)
    assert set(clock.seconds) == {"start-up", "data"} and clock.now.phase == "train"
    before = clock.now
    clock.alive()
    assert (clock.now.phase, clock.now.number) == ("train", before.number + 1)


def test_seconds_of_a_phase_add_up_over_its_turns(monkeypatch):
    now = iter([0.0, 10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    clock = Clock()
    for phase in ("data", "train", "data", "train"):
        clock.enter(phase, 0)
    assert dict(clock.seconds) == {"start-up": 10.0, "data": 3.0 + 1.0, "train": 7.0}


def test_a_phase_without_a_name_is_our_own_mistake():
    """The report and the hang page know the phases by name."""
    with pytest.raises(AssertionError, match="coffee"):
        Clock().enter("coffee", 0)
