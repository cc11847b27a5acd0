"""Curves that a person can read: smooth over what scatters, without what would flatten them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from pipeline.tracking import curves
from pipeline.tracking.curves import COLORS, PANELS, draw, smoothed
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


def legends(
    histories: Mapping[str, History], monkeypatch: pytest.MonkeyPatch
) -> list[list[tuple[str, str]]]:
    """(name, colour) of what the legend of each panel names, the sheet's first; nothing is drawn."""
    figures = []
    with monkeypatch.context() as patch:
        patch.setattr(curves, "png", lambda figure, *, dpi: figures.append(figure) or b"")
        draw(histories, title="")
    found = []
    for axes in (axes for figure in figures for axes in figure.axes):
        legend = axes.get_legend()
        texts, lines = (legend.get_texts(), legend.get_lines()) if legend else ([], [])
        found.append([(t.get_text(), line.get_color()) for t, line in zip(texts, lines)])
    return found


def test_every_panel_of_several_runs_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two colours without names are no comparison; of a single run only the loss has several."""
    one, other = (
        history(train__loss=[3.0, 2.0], tokens=[1, 2], train__lr=[lr] * 2) for lr in (1, 2)
    )
    assert legends({"slow": one, "fast": other}, monkeypatch) == [
        [("slow", COLORS[0]), ("fast", COLORS[1])]
    ] * (4 + 4)
    sheet_and_panels = (
        [[("training", COLORS[0])], [], [], []] + [[("training", COLORS[0])]] * 3 + [[]]
    )
    assert legends({"slow": one}, monkeypatch) == sheet_and_panels
