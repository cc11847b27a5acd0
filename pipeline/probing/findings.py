"""What was found, as files and as a summary on the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import MachineError, visible
from pipeline.files import write_durably
from pipeline.probing.page import block_columns, finite, page

STRONGEST = 3
"""Heads that the summary names of each score."""


def write_findings(findings: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Write probe.json and index.html; what each file that was written is.

    Raises:
        MachineError: the folder cannot be written.
    """
    files = {
        "numbers": (folder / "probe.json", json.dumps(finite(findings), allow_nan=False) + "\n"),
        "page": (folder / "index.html", page(findings)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in files.values():
            write_durably(path, text.encode())
    except OSError as error:
        raise MachineError(f"{folder} cannot be written: {error.strerror}.") from error
    return {name: path for name, (path, _) in files.items()}


def print_summary(findings: dict[str, Any]) -> None:
    """Losses and norms by block, the strongest heads of each kind, what counts for the labels."""
    averages, kinds = findings["averages"], findings["kinds"]
    print(f"means over {averages['tokens']:,} tokens")
    columns = block_columns(averages)
    print(f"{'block':<8}" + "".join(f"{title:>12}" for title in columns.values()))
    for block in range(findings["layers"]):
        values = {name: averages[name][block] for name in columns}
        row = (f"{v:>12.{4 if name.endswith('loss') else 2}f}" for name, v in values.items())
        print(f"{block:<8}" + "".join(row))
    scores = {**kinds, "sink": averages["sink"]}
    if "attribution" in averages:
        scores["attribution"] = averages["attribution"]["heads"]
    print("\nstrongest heads, block.head")
    for name, table in scores.items():
        print(f"{name:<12}" + "  ".join(strongest(table)))
    if "ablation" in findings:
        without, loss = findings["ablation"], findings["ablation"]["none"][0]
        added = [[value - loss for value in row] for row in without["heads"]]
        print(f"{'ablation':<12}" + "  ".join(strongest(added)) + "  (loss added)")
    if "curve" in findings:
        _print_curve(findings["curve"], list(kinds))
    if "patching" in findings:
        _print_patching(findings["patching"])


def strongest(table: Sequence[Sequence[float]]) -> list[str]:
    """`block.head value` of the largest values of a [L][N] table; what is no number comes last."""
    found = [(v, f"{i}.{head}") for i, row in enumerate(table) for head, v in enumerate(row)]
    found.sort(key=lambda pair: (math.isnan(pair[0]), -pair[0]))
    return [f"{place} {value:.3f}" for value, place in found[:STRONGEST]]


def _print_curve(curve: dict[str, Any], kinds: list[str]) -> None:
    """The model's loss and the strongest head of each kind, by checkpoint."""
    print(f"\n{'step':<12}{'loss':>8}" + "".join(f"{name:>18}" for name in kinds))
    for number, step in enumerate(curve["steps"]):
        best = "".join(f"{strongest(curve[name][number])[0]:>18}" for name in kinds)
        print(f"{step:<12}{curve['lens_loss'][number][-1]:>8.4f}{best}")


def _print_patching(found: dict[str, Any]) -> None:
    """Which places and heads bring the answer back."""
    low, high = found["of_other"], found["of_prompt"]
    print(
        f"\nlog-probability of {visible(found['answer'])!r}: {high:.3f} after prompt, {low:.3f} "
        "after patch_into; with what passed by for prompt put in, at block.place and block.head"
    )
    print(f"{'stream':<12}" + "  ".join(strongest(found["streams"])))
    print(f"{'head':<12}" + "  ".join(strongest(found["heads"])))
