"""One clock for the phases of a process; the watchdog asks it how long this one lasts."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass

# start-up, data (waiting for the loader), train (forward to optimizer step), evaluation, save, end
PHASES = ("start-up", "data", "train", "evaluation", "save", "end")


@dataclass(frozen=True)
class Beat:
    """A sign of life."""

    number: int
    phase: str
    step: int
    since: float
    """time.monotonic() when the phase began, or at its last sign of life."""


class Clock:
    """Time per phase; `now` is replaced whole, so another thread may read it at any time."""

    def __init__(self) -> None:
        self.started_at = time.time()
        self.now = Beat(0, "start-up", 0, time.monotonic())
        self.seconds: dict[str, float] = defaultdict(float)

    def enter(self, phase: str, step: int) -> None:
        """A phase begins, which is a sign of life; the time until now belongs to the one before."""
        assert phase in PHASES, phase
        before, now = self.now, time.monotonic()
        self.seconds[before.phase] += now - before.since
        self.now = Beat(before.number + 1, phase, step, now)

    def alive(self) -> None:
        """A sign of life inside a long phase, such as one more batch of an evaluation."""
        self.enter(self.now.phase, self.now.step)
