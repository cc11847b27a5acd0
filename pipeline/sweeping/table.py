"""What came of the points of a sweep: a line each, and their curves.

runs/SWEEP/NNN-.../{DONE,metrics.jsonl}, runs/SWEEP/ends/NNN-... --outcome_of--> Outcome --lines-->
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError
from pipeline.files import read_file, write_durably
from pipeline.sweeping.points import Point
from pipeline.tracking.history import History

ENDS = "ends"
"""Folder of a sweep: a file for each point whose run has ended here, its exit code."""


@dataclass(frozen=True)
class Outcome:
    """One point, as far as it got."""

    point: Point
    is_done: bool
    exit_code: int | None
    """Of its last start; None: it has not ended."""
    history: History | None
    """None where it logged nothing."""

    @property
    def state(self) -> str:
        """In words."""
        if self.is_done:
            return "done"
        if self.exit_code:
            return f"FAILED, exit code {self.exit_code}"
        return "not begun" if self.history is None else "not done"

    @property
    def held_out(self) -> float:
        """Mean over the datasets of the last evaluation, nats per token; NaN: there was none."""
        rows = (
            [rows[-1]["loss"] for rows in self.history.evaluations.values()] if self.history else []
        )
        return sum(rows) / len(rows) if rows else math.nan


def keep_exit_code(folder: Path, point: Point, code: int) -> None:
    """Note how a point's run ended."""
    (folder / ENDS).mkdir(parents=True, exist_ok=True)
    # Under its name: of a sweep that was given one value more, another point has the number.
    write_durably(folder / ENDS / point.name, f"{code}\n".encode())


def outcome_of(folder: Path, point: Point) -> Outcome:
    """How far a point of the sweep in `folder` is."""
    run, code, history = folder / point.name, None, None
    with contextlib.suppress(OSError, ValueError):
        code = int(read_file(folder / ENDS / point.name))
    with contextlib.suppress(DataError):  # no step was logged
        history = History.load(run)
    return Outcome(point, (run / "DONE").exists(), code, history)


def lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A table in Markdown, a line a point, and which is the best that is done."""
    keys = list(outcomes[0].point.settings)
    rows = [["point", *keys, "state", "step", "held-out loss", "training loss", "tokens/s"]]
    for outcome in outcomes:
        history = outcome.history
        numbers = ["", "", "", ""]
        if history is not None:
            last = history.steps[-1]
            mean = last.get("train/mean_loss") or last.get("train/loss") or math.nan
            numbers = [
                f"{last['step']:,}", _loss(outcome.held_out), _loss(mean),
                f"{history.tokens_per_sec:,.0f}",
            ]  # fmt: skip
        values = [value.replace("|", r"\|") for value in outcome.point.settings.values()]
        rows.append([str(outcome.point.number), *values, outcome.state, *numbers])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows]
    table.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    yield from table
    done = [o for o in outcomes if o.is_done and math.isfinite(o.held_out)]
    if done:
        best = min(done, key=lambda outcome: outcome.held_out)
        said = ", ".join(f"{key}={value}" for key, value in best.point.settings.items())
        yield f"\nleast held-out loss: point {best.point.number}, {said}: {best.held_out:.4f}"
    if failed := [str(o.point.number) for o in outcomes if not o.is_done]:
        yield f"\nnot done: {', '.join(failed)}. The same command goes on with these alone."


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else ""
