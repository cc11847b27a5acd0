"""What campaigns have survived: a line of JSON for each fault, and one when its run was compared; both add up.

    {"seed": 1, "fault": 7, "kind": "full disk", "step": 31, "starts": 0, "seconds": 11.0}    the run went on after it
    {"seed": 1, "equal": [1, 17], "last": 93}                                                those left no trace
    {"seed": 1, "lost": "fault 18, ..."}                                                     the campaign ended here

A campaign that is cut off keeps what it has compared, and the next one of its seed begins behind that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Ledger:
    """The lines of all campaigns that have written to one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, **line: Any) -> None:
        """Append a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict]:
        """All of them; half a line, of a killed program, is none."""
        if not self.path.exists():
            return []
        text = self.path.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def survived(self) -> list[dict]:
        """The faults whose runs were compared; of one that was struck twice, the later."""
        struck: dict[tuple, dict] = {}
        survived: dict[tuple, dict] = {}
        for line in self.lines():
            if "fault" in line:
                struck[line["seed"], line["fault"]] = line
            for number in line.get("equal", ()):
                survived[line["seed"], number] = struck.pop((line["seed"], number))
        return list(survived.values())

    def done(self, seed: int) -> set[tuple[int, str]]:
        """Numbers and kinds of the seed's faults that were survived."""
        return {(line["fault"], line["kind"]) for line in self.survived() if line["seed"] == seed}

    def report(self, kinds: Sequence[str], skipped: dict[str, str], machine: str) -> str:
        """A table by kind, in markdown."""
        survived, lines = self.survived(), self.lines()
        runs = [line for line in lines if "equal" in line]
        lost = [line["lost"] for line in lines if "lost" in line]
        seeds = sorted({line["seed"] for line in survived})
        text = [
            f"{len(survived)} faults survived (seed {', '.join(map(str, seeds))}) by {len(runs)} runs in "
            f"{sum(run['last'] for run in runs)} steps and {sum(s['starts'] for s in survived)} starts: losses, gradient "
            "norms, sample hashes and all tensors of the last checkpoint equal those of undisturbed runs, bit by bit.",
            "",
            *(f"LOST: {first_line(what)}" for what in lost),
            *([""] if lost else []),
            machine,
            "",
            "| fault | survived | starts | seconds until two steps further, median and longest |",
            "|---|---|---|---|",
        ]
        for kind in kinds:
            mine = [line for line in survived if line["kind"] == kind]
            if mine:
                seconds = sorted(line["seconds"] for line in mine)
                text.append(
                    f"| {kind} | {len(mine)} | {sum(line['starts'] for line in mine)} | "
                    f"{seconds[len(seconds) // 2]:.1f}, {seconds[-1]:.1f} |"
                )
            elif kind in skipped:
                text.append(f"| {kind} | skipped: needs {skipped[kind]} | | |")
        return "\n".join(text) + "\n"


def first_line(text: str) -> str:
    """What a message begins with; the logs have the rest."""
    return text.partition("\n")[0]
