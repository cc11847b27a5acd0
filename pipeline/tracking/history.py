"""What metrics.jsonl says about a run, by step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import DataError


@dataclass
class History:
    """A run's metrics by step; where a restart repeated steps, the later values count."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    """Rows of logged steps, ascending."""
    evaluations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Validation dataset to rows with step, tokens, loss, ppl, bits_per_byte; of dialogues exact,
    percent of answers.
    """
    facts: dict[str, Any] = field(default_factory=dict)
    """What the last start recorded."""
    final: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Dataset to what evaluation.json holds of it: the same, and how much was scored."""

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
                    values = {
                        k.rpartition("/")[2]: v
                        for k, v in row.items()
                        if k.startswith(f"val/{name}/")
                    }
                    evaluations[name, row["step"]] = {
                        "step": row["step"],
                        "tokens": row["tokens"],
                        **values,
                    }
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
        rates = sorted(
            self.column("throughput/tokens_per_sec")[1:] or self.column("throughput/tokens_per_sec")
        )
        return rates[len(rates) // 2]


def has_evaluation(run_dir: Path, step: int, *, names: Sequence[str]) -> bool:
    """Whether metrics.jsonl has the held-out loss of each dataset after `step`."""
    try:
        rows = [row for row in _rows(run_dir / "metrics.jsonl") if row.get("step") == step]
    except OSError:  # it is not there, or cannot be read now
        return False
    return all(any(f"val/{name}/loss" in row for row in rows) for name in names)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The lines that are rows: a killed process leaves half a line."""
    import orjson

    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
