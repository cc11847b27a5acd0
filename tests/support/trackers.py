"""A tracker that is no library: it remembers what it was told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.tracking.samples import Sample
from pipeline.tracking.tracker import At, Tracker


class Memory(Tracker):
    """Points of the series that a reader would see; one of several starts is given the same."""

    name = "Memory"

    def __init__(self, folder: Path, *, takes_back: bool = False) -> None:
        self.mark, self.takes_back = folder / "memory" / "told.json", takes_back
        self.points: dict[str, list[tuple[int, Any]]] = {}
        self.samples: list[tuple[int, list[Sample]]] = []
        self.summary: dict[str, float | None] = {}
        self.models: list[tuple[int, Path, dict[str, Any]]] = []
        self.is_down, self.known, self.opened, self.exit_code = False, False, 0, -1
        self.summaries = 0

    def is_known(self) -> bool:
        return self.known

    def open(self, after: At | None) -> None:
        self._answer()
        self.opened += 1
        if after is not None and self.takes_back:
            for points in self.points.values():
                points[:] = [point for point in points if point[0] <= after.step]

    def log(self, at: At, values: Mapping[str, Any]) -> None:
        self._answer()
        for key, value in values.items():
            self.points.setdefault(key, []).append((at.step, value))

    def log_samples(self, at: At, samples: Sequence[Sample]) -> None:
        self._answer()
        self.samples.append((at.step, list(samples)))

    def summarize(self, at: At, values: Mapping[str, float | None]) -> None:
        self._answer()
        self.summary |= values
        self.summaries += 1

    def keep_model(self, at: At, folder: Path, facts: Mapping[str, Any]) -> None:
        self._answer()
        self.models.append((at.step, folder, dict(facts)))

    def close(self, exit_code: int) -> None:
        self._answer()
        self.exit_code = exit_code

    def _answer(self) -> None:
        if self.is_down:
            raise ConnectionError("nobody there")
