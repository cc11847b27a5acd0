"""Curves that a person can read: smooth over what scatters, without what would flatten them."""

from __future__ import annotations

import math

from pipeline.tracking.curves import PANELS, draw, smoothed
from pipeline.tracking.history import History


def history(**columns: list[float]) -> History:
    length = len(next(iter(columns.values())))
    rows = [{"step": number} for number in range(length)]
    for key, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[key.replace("__", "/")] = value
    return History(steps=rows)


def test_a_smooth_curve_is_the_mean_of_the_last_numbers() -> None:
    """A step that has none, such as a skipped one, leaves no hole in it."""
    found = smoothed([math.nan, 4.0, 2.0, math.inf, 3.0, 7.0], width=2)
    assert math.isnan(found[0]) and found[1:] == [4.0, 3.0, 3.0, 2.5, 5.0]


def test_only_what_some_run_has_is_drawn() -> None:
    """Goodput and memory came later than the first runs; dollars in a name are no formula."""
    one = history(train__loss=[3.0, 2.0], tokens=[1, 2], train__lr=[0.1, 0.1])
    other = history(train__loss=[math.nan, 2.5], tokens=[1, 2], memory__peak_gib=[1.0, 2.0])
    pictures = draw({"$x$ a": one, "b": other}, title="$x")
    wanted = [p.title for p in PANELS if p.column in ("train/loss", "train/lr", "memory/peak_gib")]
    assert list(pictures.panels) == wanted and len(wanted) == 5
    assert all(png.startswith(b"\x89PNG") for png in (pictures.sheet, *pictures.panels.values()))
