"""What a cleaning job did, by step and by reason: report.json, report.png and a table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from data_prep.cleaning.one_pass import Tally
from pipeline.files import whole_file, write_durably
from pipeline.shapes import COUNT

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(folder: Path, tally: Tally, steps: list[str], *, scratch: Path) -> None:
    """Write report.png, then report.json, the sign that the job is finished."""
    tally.expect(steps)
    rows = asdict(tally)
    content = {
        "steps": {name: rows["steps"][name] for name in steps},
        "dropped": dict(sorted(rows["reasons"].items())),
    }
    with whole_file(folder / "report.png", scratch=scratch) as file:
        _plot(content).savefig(file, dpi=100, format="png", metadata={"Software": None})
    write_durably(
        folder / "report.json", orjson.dumps(content, option=orjson.OPT_INDENT_2), scratch=scratch
    )


_STEP = ("documents_in", "documents_out", "documents_changed", "bytes_in", "bytes_out")
SHAPE = {
    "steps": {str: dict.fromkeys(_STEP, COUNT)},
    "dropped": {str: {"documents": COUNT, "bytes": COUNT}},
}
"""Of report.json."""


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{'step':<20}{'documents in':>15}{'dropped':>12}{'changed':>12}{'MB in':>12}{'MB out':>12}"
        f"{'kept':>8}"
    ]
    for name, row in report["steps"].items():
        lines.append(
            f"{name:<20}{row['documents_in']:>15,}{row['documents_in'] - row['documents_out']:>12,}"
            f"{row['documents_changed']:>12,}{row['bytes_in'] / 1e6:>12,.1f}"
            f"{row['bytes_out'] / 1e6:>12,.1f}{row['bytes_out'] / max(row['bytes_in'], 1):>8.1%}"
        )
    lines.append("")
    for reason, row in sorted(
        report["dropped"].items(), key=lambda item: (-item[1]["documents"], item[0])
    ):
        lines.append(
            f"  {reason:<44}{row['documents']:>12,} documents{row['bytes'] / 1e6:>12,.1f} MB"
        )
    return "\n".join(lines)


def _plot(content: dict[str, Any]) -> Figure:
    """Left: bytes that each step leaves. Right: documents by reason, the 20 commonest."""
    from matplotlib.figure import Figure

    steps = content["steps"]
    reasons = sorted(content["dropped"].items(), key=lambda item: (-item[1]["documents"], item[0]))[
        :20
    ]
    figure = Figure(
        figsize=(12, 1.5 + 0.3 * max(len(steps) + 1, len(reasons))), layout="constrained"
    )
    left, right = figure.subplots(1, 2)
    names = ["input", *steps]
    first = next(iter(steps.values()))
    sizes = [first["bytes_in"] / 1e6, *(row["bytes_out"] / 1e6 for row in steps.values())]
    left.barh(names, sizes, color="tab:blue")
    left.bar_label(
        left.containers[0], [f"{size / max(sizes[0], 1e-9):.0%}" for size in sizes], padding=3
    )
    left.set(xlabel="MB of text after the step", title="what is left")
    right.barh(
        [name for name, _ in reasons], [row["documents"] for _, row in reasons], color="tab:orange"
    )
    right.set(xlabel="documents", title="what went, by reason")
    left.invert_yaxis()
    if reasons:
        right.invert_yaxis()
    return figure
