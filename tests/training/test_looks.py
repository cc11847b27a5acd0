"""What a run looks at every so many steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pipeline.training.looks import Looks
from pipeline.training.state import TrainState


def test_each_look_has_its_own_steps() -> None:
    """And the watchdog knows that a long one is no hang of a step."""
    seen: list[Any] = []
    clock: Any = SimpleNamespace(enter=lambda phase, step: seen.append((phase, step)))
    every = {"never": 0, "heads": 2, "text": 3}
    looks = Looks(
        [(steps, lambda state, name=name: seen.append((name, state.step))) for name, steps in every.items()],
        clock=clock,
    )  # fmt: skip
    for step in range(1, 7):
        looks.after(TrainState(step=step))
    assert [found for found in seen if found[0] != "evaluation"] == [("heads", 2), ("text", 3), ("heads", 4), ("heads", 6), ("text", 6)]  # fmt: skip
    assert seen[::2] == [("evaluation", step) for step in (2, 3, 4, 6, 6)]
