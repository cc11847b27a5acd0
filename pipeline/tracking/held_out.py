"""What a run's evaluations say of the whole run: the best, and the last.

val/DATASET/KEY of every step --Evaluations--> best/loss, best/step; final/DATASET/KEY
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipeline.tracking.tracker import At, Row

BEST = ("best/loss", "best/step", "best/tokens")


class Evaluations:
    """The evaluations so far, also those of earlier starts."""

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}  # step to its values, of all datasets

    def take(self, row: Row) -> None:
        """Note what belongs to an evaluation; of one that is done again, the later values."""
        found = {key: value for key, value in row.values.items() if key.startswith("val/")}
        if found:
            before = self._rows.get(row.at.step, Row(row.at, {}))
            self._rows[row.at.step] = Row(row.at, before.values | found)

    def forget_after(self, step: int) -> None:
        """The run is back at this step."""
        self._rows = {key: row for key, row in self._rows.items() if key <= step}

    def best(self) -> dict[str, float]:
        """Lowest mean loss over the datasets, and where it was; empty while there is none.

        Of the datasets of the newest evaluation: the mean of others, or of a part of them, as one
        has that a kill cut short, is another measure.
        """
        names = _names(self._rows[max(self._rows)]) if self._rows else set()
        compared = [row for row in self._rows.values() if _names(row) == names]
        losses = [(_mean(row.values), row.at) for row in compared]
        known = [(loss, at) for loss, at in losses if math.isfinite(loss)]
        if not known:
            return {}
        loss, at = min(known)
        return dict(zip(BEST, (loss, at.step, at.tokens), strict=True))

    def final(self, at: At) -> dict[str, float]:
        """The scores at the run's last step; empty where nothing was evaluated there."""
        row = self._rows.get(at.step)
        if row is None:
            return {}
        scores = {
            f"final/{key.removeprefix('val/')}": value
            for key, value in row.values.items()
            if value is not None
        }
        return {"final/step": at.step, "final/tokens": at.tokens, **scores}


def _names(row: Row) -> set[str]:
    """The losses that an evaluation has, one of each dataset."""
    return {key for key in row.values if key.endswith("/loss")}


def _mean(values: Mapping[str, Any]) -> float:
    """Of the losses, each dataset counting alike, as checkpoint.keep_best compares."""
    losses = [value for key, value in values.items() if key.endswith("/loss")]
    known = [value for value in losses if type(value) is float and math.isfinite(value)]
    return sum(known) / len(known) if known and len(known) == len(losses) else math.nan
