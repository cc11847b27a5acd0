"""A run's curves as a picture, and everything about it as one self-contained web page."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pipeline.errors import visible
from pipeline.files import read_file
from pipeline.tracking.history import HEADS, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROFILES = "profiles"
"""Folder of a run with the traces of training.profile_steps."""
MAX_PROFILES = 32  # that the page names; the folder has all
# Told apart by everyone.
TRAIN_COLOR = "#4477aa"
PREDICTED_COLOR = "#ee7733"
VAL_COLORS = ("#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee")
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222;
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ width: 100%; }} table {{ border-collapse: collapse; margin: 1rem 0; }}
td, th {{ padding: .2rem 1.2rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
pre {{ overflow-x: auto; background: #f6f6f6; padding: 1rem; }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<img alt="Loss, learning rate, gradient norm and throughput over the steps"
     src="data:image/png;base64,{picture}">
<h2>Held-out data</h2>
{evaluations}
{heads}<h2>Run</h2>
{facts}
{profiles}<h2>Configuration</h2>
<pre>{config}</pre>
</html>
"""


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


def draw(history: History, *, title: str, band: Band | None = None) -> bytes:
    """The four curves as a PNG.

    Args:
        history: the run's.
        title: of the picture.
        band: drawn under the loss; None: nothing was predicted.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_plain(title))
    (loss, rate), (lr, norm) = figure.subplots(2, 2)
    steps = history.column("step")
    _curve(loss, steps, history.column("train/loss"), "Loss, nats per token", label="training")
    for (name, rows), color in zip(
        history.evaluations.items(), VAL_COLORS * len(history.evaluations)
    ):
        held_out = [row["step"] for row in rows], [row["loss"] for row in rows]
        loss.plot(*held_out, "o-", color=color, markersize=4, label=_plain(f"held out: {name}"))
    if band is not None:
        _predicted(loss, band)
    loss.legend(frameon=False)
    _limit(loss, history.column("train/loss"))
    _curve(
        rate, steps, history.column("throughput/tokens_per_sec"), "Throughput, tokens per second"
    )
    rate.set_ylim(bottom=0)
    _curve(lr, steps, history.column("train/lr"), "Learning rate")
    _curve(norm, steps, history.column("train/grad_norm"), "Gradient norm, before clipping")
    norm.set_yscale("log")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    return picture.getvalue()


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


def _plain(text: str) -> str:
    """A name in a picture: matplotlib would set what stands between dollars as a formula."""
    return visible(text).replace("$", r"\$")


def page(history: History, run_dir: Path, picture: bytes, *, remarks: Sequence[str] = ()) -> str:
    """The web page; needs no other file.

    Args:
        history: the run's.
        run_dir: its folder.
        picture: what draw gave.
        remarks: lines under the summary.
    """
    last, facts = history.steps[-1], history.facts
    summary = (
        f"Step {last['step']:,}, {last['tokens']:,} tokens, {facts.get('num_parameters', 0):,} "
        f"parameters, {history.tokens_per_sec:,.0f} tokens/s on {facts.get('world_size')} x "
        f"{facts.get('device')}; training loss {_text(history.column('train/loss')[-1])}, "
        f"{last.get('resilience/restarts')} restarts, "
        f"{last.get('resilience/skipped_steps')} skipped steps."
    )
    if last.get("goodput/goodput") is not None and last.get("goodput/lost_steps") is not None:
        summary += (
            f" Goodput {100 * last['goodput/goodput']:.0f} %, "
            f"{last['goodput/lost_steps']:.0f} steps done twice."
        )
    found = [(name, row["step"], row) for name, r in history.evaluations.items() for row in r]
    found += [(name, "evaluation.json", row) for name, row in history.final.items()]
    columns = {"loss": "loss", "ppl": "perplexity", "bits_per_byte": "bits per byte"}
    if any(row.get("exact") is not None for *_, row in found):
        columns["exact"] = "exact answers, %"
    rows = [[*place, *(row.get(key, "") for key in columns)] for *place, row in found]
    try:
        config = read_file(run_dir / "config.yaml", inside=run_dir).decode(errors="replace")
    except OSError as error:  # the page tells of the run without it
        config = f"config.yaml cannot be read: {error.strerror}"
    return PAGE.format(
        title=html.escape(run_dir.resolve().name),
        summary="<br>\n".join(map(html.escape, [summary, *remarks])),
        picture=base64.b64encode(picture).decode(),
        evaluations=_table(["dataset", "step", *columns.values()], rows),
        heads=_heads(history),
        facts=_table(["fact", "value"], [[key, str(value)] for key, value in facts.items()]),
        profiles=_profiles(run_dir),
        config=html.escape(config),
    )


def _heads(history: History) -> str:
    """What was seen of attention heads, where somebody looked; nothing elsewhere."""
    if not history.heads:
        return ""
    rows = [[row["step"], *(row[name] for name in HEADS)] for row in history.heads]
    note = (
        "The strongest head's attention to the token before, to the same token earlier and to what "
        "came after it, and means over all heads, on random tokens that repeat (docs/probing.md)."
    )
    return f"<h2>Attention heads</h2>\n<p>{note}</p>\n{_table(['step', *HEADS], rows)}\n"


def _profiles(run_dir: Path) -> str:
    """Links to traces and memory snapshots, which stay where they are; nothing where none are."""
    paths = sorted((run_dir / PROFILES).glob("*/*.*"))
    paths = [path for path in paths if not path.name.startswith(".")]
    if not paths:
        return ""
    names = [path.relative_to(run_dir).as_posix() for path in paths[:MAX_PROFILES]]
    items = "".join(
        f'<li><a href="../{quote(name, errors="surrogateescape")}">{html.escape(visible(name))}</a>'
        "</li>"
        for name in names
    )
    more = f"<p>{len(paths) - len(names)} more in {PROFILES}/.</p>\n" if paths[len(names) :] else ""
    return (
        "<h2>Profiles</h2>\n<p>Open a trace in ui.perfetto.dev, a memory.pickle in "
        f"pytorch.org/memory_viz.</p>\n<ul>{items}</ul>\n{more}"
    )


def _curve(axes: Axes, x: list[float], y: list[float], title: str, label: str = "") -> None:
    axes.plot(x, y, color=TRAIN_COLOR, linewidth=1.2, label=label)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _limit(axes: Axes, values: list[float]) -> None:
    """Leave a first loss or a spike that would flatten the rest outside the picture."""
    finite = sorted(value for value in values if math.isfinite(value))
    if len(finite) > 20:
        low, high = finite[0], finite[int(0.97 * len(finite))]
        axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; numbers are set right-aligned."""
    if not rows:
        return "<p>None.</p>"

    def cell(value: Any) -> str:
        kind = ' class="number"' if isinstance(value, int | float) else ""
        return f"<td{kind}>{html.escape(_text(value))}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
