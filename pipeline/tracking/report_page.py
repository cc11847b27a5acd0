"""A run's pictures, and everything about it and those beside it, as one self-contained web page.

    History, config.yaml, samples, Pictures --page--> HTML that needs no other file and no network

It is read on a telephone and on paper too: pictures stand beside each other as there is room, wide
tables scroll in a box of their own.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.errors import visible
from pipeline.files import parse_yaml, read_file
from pipeline.tracking.console import duration
from pipeline.tracking.curves import Pictures
from pipeline.tracking.history import HEADS, History, number
from pipeline.tracking.samples import Sample

PROFILES = "profiles"
"""Folder of a run with the traces of training.profile_steps."""
MAX_PROFILES = 32  # that the page names; the folder has all
MAX_SAMPLED_STEPS = 12  # whose texts the page shows; samples.jsonl has all
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto;
       padding: 0 1rem; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 23rem), 1fr));
          gap: 1rem; }}
img {{ width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: 1rem 0; overflow-wrap: normal; }}
td, th {{ padding: .2rem 1.2rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd;
         vertical-align: top; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
pre {{ overflow-x: auto; background: #f6f6f6; padding: 1rem; font-size: .85rem; }}
pre.text {{ white-space: pre-wrap; }} pre b {{ color: #4477aa; font-weight: normal; }}
@media print {{ body {{ max-width: none; margin: 0; font-size: 11px; }}
  .curves {{ grid-template-columns: 1fr 1fr; }} img, tr, pre.text {{ break-inside: avoid; }} }}
</style></head><body>
<h1>{title}</h1>
<p>{summary}</p>
<div class="curves">
{pictures}
</div>
{beside}<h2>Held-out data</h2>
{evaluations}
{samples}{heads}{lens}<h2>Run</h2>
{facts}
{profiles}<h2>Configuration</h2>
<details><summary>all settings</summary><pre>{config}</pre></details>
</body></html>
"""
Runs = Mapping[str, tuple[Path, History]]


def page(
    runs: Runs,
    pictures: Pictures,
    *,
    samples: Mapping[int, Sequence[Sample]],
    remarks: Sequence[str] = (),
) -> str:
    """The web page; needs no other file.

    Args:
        runs: name to folder and history; of the first one everything is told, the others are
            compared with it.
        pictures: what curves.draw gave.
        samples: of the first one, by step.
        remarks: lines under the summary.
    """
    (name, (run_dir, history)), *_ = runs.items()
    return PAGE.format(
        title=html.escape(name),
        summary="<br>\n".join(map(html.escape, [*_summary(history), *remarks])),
        pictures="\n".join(
            f'<img alt="{html.escape(title)}" src="data:image/png;base64,'
            f'{base64.b64encode(png).decode()}">'
            for title, png in pictures.panels.items()
        ),
        beside=_beside(runs) if len(runs) > 1 else "",
        evaluations=_evaluations(runs),
        samples=_samples(samples),
        heads=_heads(history),
        lens=_lens(history),
        facts=_table(["fact", "value"], [[key, str(v)] for key, v in _facts(history).items()]),
        profiles=_profiles(run_dir),
        config=html.escape(_config(run_dir)),
    )


def _summary(history: History) -> list[str]:
    """What a run came to, in a few sentences."""
    last, facts = history.steps[-1], history.facts
    lines = [
        f"Step {last['step']:,}, {last['tokens']:,} tokens, {facts.get('num_parameters', 0):,} "
        f"parameters, {_rate(history)} on {facts.get('world_size', 1)} x "
        f"{facts.get('device', 'unknown')}; training loss {_loss(history)}, "
        f"{last.get('resilience/restarts', 0)} restarts, "
        f"{last.get('resilience/skipped_steps', 0)} skipped steps."
    ]
    if last.get("goodput/goodput") is not None and last.get("goodput/lost_steps") is not None:
        lines[0] += (
            f" Goodput {100 * last['goodput/goodput']:.0f} %, "
            f"{last['goodput/lost_steps']:.0f} steps done twice."
        )
    if (began := _date(history.began)) and history.ended >= history.began:
        took = duration(history.ended - history.began)
        lines.append(f"Begun {began}, last heard of {took} later.")
    return lines


def _rate(history: History) -> str:
    rate = history.tokens_per_sec
    return f"{rate:,.0f} tokens/s" if math.isfinite(rate) else "at a rate that is not known"


def _loss(history: History) -> str:
    """The last one that is a number, and of which step, where the last step has none."""
    finite = [row for row in history.steps if math.isfinite(number(row.get("train/loss")))]
    if not finite:
        return "no number"
    text = _text(number(finite[-1]["train/loss"]))
    is_last = finite[-1] is history.steps[-1]
    return text if is_last else f"{text} after step {finite[-1]['step']:,}, no number since"


def _date(seconds: float) -> str:
    """A time in words, UTC; empty where it is none that a calendar has."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return ""


def _facts(history: History) -> dict[str, Any]:
    """What the last start recorded, in words."""
    facts = dict(history.facts)
    if isinstance(versions := facts.get("versions"), dict):
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    if isinstance(command := facts.get("command"), list):
        facts["command"] = " ".join(map(str, command))
    if isinstance(datasets := facts.pop("datasets", None), dict):
        for identity, found in datasets.items():
            row = found if isinstance(found, dict) else {}
            facts[f"data {row.get('name', '')}"] = (
                f"{_text(row.get('tokens', '?'))} tokens in {row.get('path', '?')}, {identity[:12]}"
            )
    return {key.replace("_", " "): value for key, value in facts.items()}


def _evaluations(runs: Runs) -> str:
    """Every evaluation of every run, with how many tokens it scored."""
    several = len(runs) > 1
    found: list[tuple[list[Any], dict[str, Any]]] = []
    for name, (_, history) in runs.items():
        own = [name] if several else []
        for dataset, rows in history.evaluations.items():
            found += [([*own, dataset, row["step"]], row) for row in rows]
        for dataset, row in history.final.items():
            found.append(([*own, dataset, "evaluation.json"], row | {"scored": row["tokens"]}))
    columns = {"scored": "tokens scored", "loss": "loss", "ppl": "perplexity"}
    columns["bits_per_byte"] = "bits per byte"
    if any(row.get("exact") is not None for _, row in found):
        columns["exact"] = "exact answers, %"
    table = _table(
        [*(["run"] if several else []), "dataset", "step", *columns.values()],
        [[*place, *(_whole(row.get(key, "")) for key in columns)] for place, row in found],
    )
    scored = {row["scored"] for _, row in found if math.isfinite(row.get("scored", math.nan))}
    note = (
        "<p>Rows of other numbers of tokens are of other parts of the data: their losses and bits "
        "per byte do not compare (training.eval_sequences; pipeline.evaluate scores all).</p>\n"
    )
    if not found:
        return (
            "<p>None yet: training evaluates every training.eval_every steps and at its end, "
            "<code>python -m pipeline.evaluate runs/NAME</code> at any time.</p>"
        )
    return (note if len(scored) > 1 else "") + table


def _samples(samples: Mapping[int, Sequence[Sample]]) -> str:
    """What the model wrote, the newest step open; nothing where it was not asked to."""
    if not samples:
        return ""
    parts: list[str] = []
    for step in sorted(samples, reverse=True)[:MAX_SAMPLED_STEPS]:
        texts = "".join(
            f'<pre class="text"><b>{html.escape(visible(sample.prompt))}</b>'
            f"{html.escape(visible(sample.text))}</pre>"
            for sample in samples[step]
        )
        is_open = "" if parts else " open"
        parts.append(f"<details{is_open}><summary>step {step:,}</summary>{texts}</details>")
    return "<h2>Samples</h2>\n" + "\n".join(parts) + "\n"


def _beside(runs: Runs) -> str:
    """Where runs end, and which of their settings differ."""
    ends = [
        [
            name, h.steps[-1]["step"], h.steps[-1]["tokens"], _loss(h),
            _rate(h).removesuffix(" tokens/s"),
        ]
        for name, (_, h) in runs.items()
    ]  # fmt: skip
    settings = {name: _flat(_config(folder)) for name, (folder, _) in runs.items()}
    keys = sorted({key for found in settings.values() for key in found} - {"name"})
    differing = [
        [key, *values]
        for key in keys
        if len(set(values := [found.get(key, "") for found in settings.values()])) > 1
    ]
    header = ["run", "step", "tokens", "training loss", "tokens/s"]
    return (
        f"<h2>Runs</h2>\n{_table(header, ends)}\n<h2>Settings that differ</h2>\n"
        f"{_table(['setting', *runs], differing)}\n"
    )


def _config(run_dir: Path) -> str:
    try:
        return read_file(run_dir / "config.yaml", inside=run_dir).decode(errors="replace")
    except OSError as error:  # the page tells of the run without it
        return f"config.yaml cannot be read: {error.strerror}"


def _flat(text: str) -> dict[str, str]:
    """Dotted key to value of a config.yaml; nothing of what is none."""
    found: dict[str, str] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), inner)
        elif prefix:
            found[prefix] = str(value)

    try:
        add("", parse_yaml(text))
    except (RecursionError, ValueError):
        return {}
    return found


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


def _lens(history: History) -> str:
    """What the stream after each block would have predicted; nothing where nobody looked."""
    if not history.lens:
        return ""
    count = max(len(row["losses"]) for row in history.lens)
    rows = [[row["step"], *row["losses"]] for row in history.lens]
    note = (
        "Loss on a little held-out text, nats per token, if the model ended after a block: the "
        "logit lens (docs/probing.md). The last column is the model's own."
    )
    header = ["step", *(f"block {number}" for number in range(count))]
    return f"<h2>Logit lens</h2>\n<p>{note}</p>\n{_table(header, rows)}\n"


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


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; numbers are set right-aligned."""
    if not rows:
        return "<p>None.</p>"

    def cell(value: Any) -> str:
        kind = ' class="number"' if isinstance(value, int | float) else ""
        return f"<td{kind}>{html.escape(_text(value))}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _whole(value: Any) -> Any:
    """A count that went through a float as a whole number; nothing for what is not known."""
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    return int(value) if isinstance(value, float) and value > 1000 and value.is_integer() else value
