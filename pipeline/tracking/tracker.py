"""What a library that draws runs is asked: one interface, which W&B and TensorBoard implement.

    Metrics --> Trackers --> a Feed for each: queue, thread, mark --> Tracker: the library

A new library is a class with these methods and a line in trackers.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipeline.tracking.samples import Sample


class At(NamedTuple):
    """Where in a run something was measured."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Training tokens they used."""
    time: float
    """Seconds since 1970."""


class Row(NamedTuple):
    """Values of one place in a run, by metric name."""

    at: At
    values: dict[str, Any]
    """Numbers, None for what is not known, lists, words: the library takes what it can draw."""


class Tracker(Protocol):
    """One run in one library. Called on one thread at a time; whatever it raises ends no run.

    After an error it is opened again, and told again what it did not take.
    """

    name: str
    """Of the library, in warnings."""
    mark: Path
    """Where Feed keeps what the library has been told."""
    takes_back: bool
    """Whether `open(after)` hides later points; if not, the first point of a step stays."""

    def is_known(self) -> bool:
        """Whether the library was told of this run before, by a program that left no mark too."""

    def open(self, after: At | None) -> None:
        """Begin, or go on with, the series of this run; what an earlier opening left is given up.

        Args:
            after: the run is back here: what was drawn behind it is to be hidden. None: nothing is.
        """

    def log(self, at: At, values: Mapping[str, Any]) -> None:
        """Draw these values: all of them, or an error and none."""

    def log_samples(self, at: At, samples: Sequence[Sample]) -> None:
        """Show what the model wrote."""

    def summarize(self, at: At, values: Mapping[str, float | None]) -> None:
        """Say of the whole run, known `at` that step: the best loss, the last evaluation.

        Args:
            at: the step.
            values: None takes back what was said.
        """

    def keep_model(self, at: At, folder: Path, facts: Mapping[str, Any]) -> None:
        """Keep, or name, an exported model of this step, a Hugging Face folder."""

    def close(self, exit_code: int) -> None:
        """The process ends with this code; the library has all it was told when this returns."""
