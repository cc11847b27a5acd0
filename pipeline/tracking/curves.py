"""The curves of one run or of several, each as a small picture, and the first of them on one sheet.

    name -> History --draw--> Pictures: title -> PNG, for the page; a sheet of four for anywhere

A single run's loss is drawn as it was logged, pale, and smoothed over it; several runs have a
colour each.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import visible
from pipeline.tracking.history import HEADS, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by everyone.
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee")
PREDICTED_COLOR = "#ee7733"
SMALL, SHEET = (4.6, 3.1), (11, 7)
"""Inches. A small one is read at 370 pixels, on a telephone: its letters are 11 of them high."""
SMOOTHED = 40
"""Of the logged steps, the part over which a smooth curve is averaged is one in so many."""


@dataclass(frozen=True)
class Band:
    """What was predicted of a run's loss, by step."""

    steps: list[float]
    low: list[float]
    high: list[float]
    """Least and most training loss at each of `steps`."""
    end: float
    """The last step."""
    loss: float
    interval: tuple[float, float]
    """Held-out loss after the last step: the likeliest, and between which it lies."""


@dataclass(frozen=True)
class _Panel:
    """One picture: a column of the logged steps over another one."""

    title: str
    column: str
    x: str = "step"
    from_zero: bool = False
    logarithmic: bool = False


X_LABELS = {"step": "step", "tokens": "training tokens", "hours": "hours since the first start"}
LOSS = "train/loss"
PANELS = (
    _Panel("Loss by step, nats per token", LOSS),
    _Panel("Loss by tokens, nats per token", LOSS, x="tokens"),
    _Panel("Loss by time, nats per token", LOSS, x="hours"),
    _Panel("Throughput, tokens per second", "warm_rate", from_zero=True),
    _Panel("Learning rate", "train/lr"),
    _Panel("Gradient norm, before clipping", "train/grad_norm", logarithmic=True),
    _Panel("Most memory so far, GiB", "memory/peak_gib", from_zero=True),
    _Panel("Goodput: share of the time that became progress", "goodput/goodput", from_zero=True),
)
HEADS_TITLE = "Attention heads: score of the strongest"
LENS_TITLE = "Logit lens: loss after each block, nats"
SHEET_PANELS = (PANELS[0], PANELS[3], PANELS[4], PANELS[5])


class Pictures(NamedTuple):
    """PNGs."""

    sheet: bytes
    """Loss, throughput, learning rate and gradient norm."""
    panels: dict[str, bytes]
    """By title; those that some run has values for."""


def draw(histories: Mapping[str, History], *, title: str, band: Band | None = None) -> Pictures:
    """The curves of the runs.

    Args:
        histories: by the name that the legend shows.
        title: of the sheet.
        band: drawn under the loss by step of a single run; None: nothing was predicted.
    """
    return Pictures(_sheet(histories, title, band), _panels(histories, band))


def _panels(histories: Mapping[str, History], band: Band | None) -> dict[str, bytes]:
    found = {}
    for panel in PANELS:
        if not any(map(math.isfinite, _all_values(histories, panel.column))):
            continue
        figure, axes = _figure(SMALL, 1)
        _draw(axes[0], panel, histories, band)
        found[panel.title] = png(figure, dpi=170)
    return found | (_looks(*histories.values()) if len(histories) == 1 else {})


def _looks(history: History) -> dict[str, bytes]:
    """What training.probe_every saw of a single run: heads as they come about, and the lens."""
    found = {}
    if history.heads:
        figure, axes = _figure(SMALL, 1)
        steps = [row["step"] for row in history.heads]
        for name, color in zip(HEADS[:3], COLORS, strict=False):
            scores = [row[name] for row in history.heads]
            axes[0].plot(steps, scores, color=color, linewidth=1.4, label=name)
        axes[0].set_ylim(0, 1)
        axes[0].legend(frameon=False, fontsize=8)
        _frame(axes[0], HEADS_TITLE, X_LABELS["step"])
        found[HEADS_TITLE] = png(figure, dpi=170)
    if history.lens:
        figure, axes = _figure(SMALL, 1)
        count = max(len(row["losses"]) for row in history.lens)
        for block in range(count):
            rows = [row for row in history.lens if block < len(row["losses"])]
            steps, losses = [row["step"] for row in rows], [row["losses"][block] for row in rows]
            # Pale blocks are early ones; the last is the model.
            alpha = 1.0 if block == count - 1 else 0.2 + 0.5 * block / count
            label = {0: "block 0", count - 1: f"block {count - 1}"}.get(block)
            axes[0].plot(steps, losses, color=COLORS[0], alpha=alpha, linewidth=1.4, label=label)
        axes[0].legend(frameon=False, fontsize=8)
        _frame(axes[0], LENS_TITLE, X_LABELS["step"])
        found[LENS_TITLE] = png(figure, dpi=170)
    return found


def _sheet(histories: Mapping[str, History], title: str, band: Band | None) -> bytes:
    figure, axes = _figure(SHEET, 2)
    figure.suptitle(plain(title))
    for one, panel in zip(axes, SHEET_PANELS, strict=True):
        _draw(one, panel, histories, band)
    return png(figure, dpi=110)


def smoothed(values: Sequence[float], *, width: int) -> list[float]:
    """Means of the last `width` values at each place, of those that are numbers; NaN before any."""
    found, window, total = [], list[float](), 0.0
    for value in values:
        if math.isfinite(value):
            window.append(value)
            total += value
            if len(window) > width:
                total -= window.pop(0)
        found.append(total / len(window) if window else math.nan)
    return found


def plain(text: str) -> str:
    """A name in a picture: matplotlib would set what stands between dollars as a formula."""
    return visible(text).replace("$", r"\$")


def _draw(axes: Axes, panel: _Panel, histories: Mapping[str, History], band: Band | None) -> None:
    """One panel: a colour a run, or of a single one a colour for each thing that is drawn."""
    is_loss, is_one = panel.column == LOSS, len(histories) == 1
    for (name, history), color in zip(histories.items(), COLORS * len(histories)):
        x, values = history.column(panel.x), history.column(panel.column)
        label = "training" if is_one else name
        if is_loss:
            axes.plot(x, values, color=color, linewidth=0.8, alpha=0.3)
            width = max(1, len(values) // SMOOTHED)
            label += f", mean of {width} logged" if is_one and width > 1 else ""
            values = smoothed(values, width=width)
            _held_out(axes, panel, history, None if is_one else color)
        # A line of one point is none.
        marker = "." if sum(map(math.isfinite, values)) < 2 else ""
        axes.plot(x, values, color=color, linewidth=1.4, marker=marker, label=plain(label))
    if is_loss and panel.x == "step" and band is not None and is_one:
        _predicted(axes, band)
    _frame(axes, panel.title, X_LABELS[panel.x])
    if panel.logarithmic:
        axes.set_yscale("log")
    if is_loss:
        _limit(axes, _all_values(histories, LOSS))
    elif panel.from_zero:
        axes.set_ylim(bottom=0)
    if is_loss or not is_one:
        axes.legend(frameon=False, fontsize=8)


def _frame(axes: Axes, title: str, x_label: str) -> None:
    """What every panel has."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _held_out(axes: Axes, panel: _Panel, history: History, color: str | None) -> None:
    """Evaluations over the training loss; `color`: of the run, None: one for each dataset."""
    for number, (name, rows) in enumerate(history.evaluations.items()):
        own = color or COLORS[1 + number % (len(COLORS) - 1)]
        axes.plot(
            [row[panel.x] for row in rows],
            [row["loss"] for row in rows],
            "o" if color else "o-",
            color=own,
            markersize=4,
            label=None if color else plain(f"held out: {name}"),
        )


def _predicted(axes: Axes, band: Band) -> None:
    """The predicted course and end, under the run's own curve."""
    label = "predicted course"
    axes.fill_between(
        band.steps, band.low, band.high, color=PREDICTED_COLOR, alpha=0.2, label=label
    )
    draw_interval(
        axes, band.end, band.loss, band.interval,
        color=PREDICTED_COLOR, markersize=4, label="predicted, held out",
    )  # fmt: skip


def draw_interval(
    axes: Axes, place: float, value: float, ends: tuple[float, float], *,
    color: str, markersize: float, label: str,
) -> None:  # fmt: skip
    """A value and an interval, which need not hold it: a narrow one of a bootstrap may not."""
    axes.plot([place], [value], "D", color=color, markersize=markersize, label=label)
    half = (ends[1] - ends[0]) / 2
    axes.errorbar([place], [ends[0] + half], yerr=half, fmt="none", capsize=4, ecolor=color)


def _limit(axes: Axes, values: Sequence[float]) -> None:
    """Leave a first loss or a spike that would flatten the rest outside the picture."""
    finite = sorted(value for value in values if math.isfinite(value))
    if len(finite) > 20:
        low, high = finite[0], finite[int(0.97 * len(finite))]
        axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def _all_values(histories: Mapping[str, History], column: str) -> list[float]:
    return [value for history in histories.values() for value in history.column(column)]


def _figure(size: tuple[float, float], rows: int) -> tuple[Any, list[Axes]]:
    """A figure of rows x rows panels that no window shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [*figure.subplots(rows, rows, squeeze=False).flat]


def png(figure: Any, *, dpi: int) -> bytes:
    """The picture of a figure with a canvas of Agg; `dpi`: dots per inch."""
    picture = io.BytesIO()
    figure.set_dpi(dpi)
    figure.canvas.print_png(picture)  # savefig would draw all of it a second time
    return picture.getvalue()
