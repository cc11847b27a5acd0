"""Draw a run: loss, learning rate, gradient norm and throughput as a picture and as one self-contained web page.

    python -m pipeline.report runs/NAME

    runs/NAME/metrics.jsonl --History--> runs/NAME/report/curves.png, runs/NAME/report/index.html

Works on a running or killed run too: it reads what is there. An evaluation that pipeline.evaluate left in the run
(output=runs/NAME/evaluation.json) is shown beside the evaluations of the training.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from pipeline import cli
from pipeline.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN_COLOR, VAL_COLORS = "#4477aa", ("#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee")  # told apart by everyone

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
img {{ width: 100%; }} table {{ border-collapse: collapse; margin: 1rem 0; }}
td, th {{ padding: .2rem 1.2rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
pre {{ overflow-x: auto; background: #f6f6f6; padding: 1rem; }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<img alt="Loss, learning rate, gradient norm and throughput over the steps" src="data:image/png;base64,{picture}">
<h2>Held-out data</h2>
{evaluations}
<h2>Run</h2>
{facts}
<h2>Configuration</h2>
<pre>{config}</pre>
</html>
"""


@dataclass
class ReportConfig:
    """What is drawn."""

    run: str = MISSING
    """Run folder, runs/NAME."""


@dataclass
class History:
    """A run's metrics by step; where a restart repeated steps, the later values count."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    """Rows of logged steps, ascending."""
    evaluations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Validation dataset to rows with step, tokens, loss, ppl, bits_per_byte."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the last start recorded."""
    final: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Dataset to loss, ppl, bits_per_byte, tokens of evaluation.json."""

    @classmethod
    def load(cls, run_dir: Path) -> History:
        """The history in run_dir/metrics.jsonl.

        Raises:
            DataError: there is no such file, or no logged step in it.
        """
        path = run_dir / "metrics.jsonl"
        if not path.exists():
            raise DataError(f"there is no {path}. Give the folder of a run, runs/NAME.")
        history, steps, evaluations = cls(), {}, {}
        for row in _rows(path):
            if row.get("event") == "start":
                history.facts = {"world_size": row["world_size"], **row["facts"]}
            if "train/loss" in row:
                steps[row["step"]] = row
            for key in row:
                if key.startswith("val/") and key.endswith("/loss"):
                    name = key.removeprefix("val/").removesuffix("/loss")
                    values = {k.rpartition("/")[2]: v for k, v in row.items() if k.startswith(f"val/{name}/")}
                    evaluations[name, row["step"]] = {"step": row["step"], "tokens": row["tokens"], **values}
        if not steps:
            raise DataError(f"{path} holds no logged step yet.")
        history.steps = [steps[step] for step in sorted(steps)]
        if (run_dir / "evaluation.json").exists():
            history.final = json.loads((run_dir / "evaluation.json").read_text())["results"]
        for name, step in sorted(evaluations):
            history.evaluations.setdefault(name, []).append(evaluations[name, step])
        return history

    def column(self, key: str) -> list[float]:
        """One value of every logged step, NaN where it is not known."""
        return [float("nan") if row.get(key) is None else row[key] for row in self.steps]

    @property
    def tokens_per_sec(self) -> float:
        """Median over the logged steps, without each process's first, which warms up."""
        rates = sorted(self.column("throughput/tokens_per_sec")[1:] or self.column("throughput/tokens_per_sec"))
        return rates[len(rates) // 2]


def main(cfg: ReportConfig) -> None:
    """Write report/curves.png and report/index.html into the run folder."""
    run_dir = Path(cfg.run)
    history = History.load(run_dir)
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    draw(history, folder / "curves.png", title=run_dir.resolve().name)
    (folder / "index.html").write_text(page(history, run_dir, folder / "curves.png"))
    # The evaluations during training may have seen a part of the dataset; pipeline.evaluate saw all of it.
    during = {name: rows for name, rows in history.evaluations.items() if name not in history.final}
    scores = [(name, f"step {rows[-1]['step']}", rows[-1]) for name, rows in during.items()]
    scores += [(name, f"{row['tokens']:,} tokens", row) for name, row in history.final.items()]
    for name, where, row in scores:
        values = f"loss {row['loss']:.4f}, {row['bits_per_byte']:.4f} bits per byte"
        print(f"{'held out':14} {values}  ({name}, {where})")
    print(f"{'speed':14} {history.tokens_per_sec:,.0f} tokens/s")
    places = {"curves": folder / "curves.png", "page": folder / "index.html", "numbers": run_dir / "metrics.jsonl"}
    places |= {"checkpoints": run_dir / "checkpoints", "W&B, offline": run_dir / "wandb"}
    for what, place in places.items():
        if place.exists():
            print(f"{what:14} {place}")


def draw(history: History, path: Path, *, title: str) -> None:
    """Write the four curves as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    (loss, rate), (lr, norm) = figure.subplots(2, 2)
    steps = history.column("step")
    _curve(loss, steps, history.column("train/loss"), "Loss, nats per token", label="training")
    for (name, rows), color in zip(history.evaluations.items(), VAL_COLORS * len(history.evaluations)):
        held_out = [row["step"] for row in rows], [row["loss"] for row in rows]
        loss.plot(*held_out, "o-", color=color, markersize=4, label=f"held out: {name}")
    loss.legend(frameon=False)
    _limit(loss, history.column("train/loss"))
    _curve(rate, steps, history.column("throughput/tokens_per_sec"), "Throughput, tokens per second")
    rate.set_ylim(bottom=0)
    _curve(lr, steps, history.column("train/lr"), "Learning rate")
    _curve(norm, steps, history.column("train/grad_norm"), "Gradient norm, before clipping")
    norm.set_yscale("log")
    figure.savefig(path, dpi=110)


def page(history: History, run_dir: Path, picture: Path) -> str:
    """The web page; needs no other file."""
    last, facts = history.steps[-1], history.facts
    summary = (
        f"Step {last['step']:,}, {last['tokens']:,} tokens, {facts.get('num_parameters', 0):,} parameters, "
        f"{history.tokens_per_sec:,.0f} tokens/s on {facts.get('world_size')} x {facts.get('device')}; "
        f"training loss {_text(last['train/loss'])}, {last['resilience/restarts']} restarts, "
        f"{last['resilience/skipped_steps']} skipped steps."
    )
    if "goodput/goodput" in last:
        summary += f" Goodput {100 * last['goodput/goodput']:.0f} %, {last['goodput/lost_steps']:.0f} steps done twice."
    rows = [
        [name, row["step"], row["loss"], row["ppl"], row["bits_per_byte"]]
        for name, found in history.evaluations.items()
        for row in found
    ]
    rows += [[name, "evaluation.json", r["loss"], r["ppl"], r["bits_per_byte"]] for name, r in history.final.items()]
    config = run_dir / "config.yaml"
    return PAGE.format(
        title=html.escape(run_dir.resolve().name),
        summary=html.escape(summary),
        picture=base64.b64encode(picture.read_bytes()).decode(),
        evaluations=_table(["dataset", "step", "loss", "perplexity", "bits per byte"], rows),
        facts=_table(["fact", "value"], [[key, str(value)] for key, value in facts.items()]),
        config=html.escape(config.read_text() if config.exists() else ""),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    import orjson

    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(orjson.loads(line))
        except orjson.JSONDecodeError:  # a killed process leaves half a line
            continue
    return rows


def _curve(axes: Axes, x: list[float], y: list[float], title: str, label: str = "") -> None:
    axes.plot(x, y, color=TRAIN_COLOR, linewidth=1.2, label=label)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _limit(axes: Axes, values: list[float]) -> None:
    """Leave a first loss or a spike that would flatten the rest outside the picture."""
    finite = sorted(value for value in values if value == value)
    if len(finite) > 20:
        low, high = finite[0], finite[int(0.97 * len(finite))]
        axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
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


if __name__ == "__main__":
    cli.run(main, ReportConfig, config="report", positional=["run"])
