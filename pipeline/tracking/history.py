"""What metrics.jsonl says about a run, by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.shapes import COUNT, misfits, read_object
from pipeline.tracking.row_file import read_rows
from pipeline.tracking.tracker import At, Row

_NUMBER, _SCORES = (float, None), ("loss", "ppl", "bits_per_byte")
HEADS = ("previous", "duplicate", "induction", "entropy", "sink")
"""What training.probe_every logs of attention heads, as probe/NAME."""
MOST_BLOCKS = 1024
"""Of a model, in a row of the lens: each is a curve and a column of the report."""
LATEST = 1e11
"""Seconds since 1970 beyond any run's."""
# What is read of a row and of evaluation.json; `?`: may be missing.
ROW = {
    "event?": str,
    "time?": _NUMBER,
    "facts?": {"num_parameters?": COUNT, "datasets?": dict},
    "step?": COUNT,
    "tokens?": COUNT,
    "train/loss?": _NUMBER,
    "train/lr?": _NUMBER,
    "train/grad_norm?": _NUMBER,
    "throughput/tokens_per_sec?": _NUMBER,
    "goodput/goodput?": _NUMBER,
    "goodput/lost_steps?": _NUMBER,
    **{f"probe/{name}?": _NUMBER for name in HEADS},
}
_RESULT = {"tokens": COUNT, **dict.fromkeys(_SCORES, _NUMBER), "exact?": _NUMBER}
EVALUATION = {"results": {str: _RESULT}}


@dataclass
class History:
    """A run's metrics by step; where a restart repeated steps, the later values count."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    """Rows of logged steps, ascending; beside what was logged `hours` since the first start, and
    `warm_rate`, tokens per second but of a start's first row, in which memory is allocated.
    """
    evaluations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Validation dataset to rows with step, tokens, hours, loss, ppl, bits_per_byte, scored, which
    is how many tokens were; of dialogues exact, percent of answers.
    """
    heads: list[dict[str, Any]] = field(default_factory=list)
    """Rows with step and HEADS, ascending, where training.probe_every looked."""
    lens: list[dict[str, Any]] = field(default_factory=list)
    """Likewise, rows with step and losses: of the logit lens after each block, nats per token."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the last start recorded."""
    final: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Dataset to what evaluation.json holds of it: scores, and how many tokens they are of."""
    began: float = math.nan
    """Seconds since 1970 of the first start; NaN: not known."""
    ended: float = math.nan
    """Likewise, of the last row."""

    @classmethod
    def load(cls, run_dir: Path) -> History:
        """The history in run_dir/metrics.jsonl.

        Raises:
            DataError: there is no such file, no logged step in it, or a row of something else.
        """
        path = run_dir / "metrics.jsonl"
        if not path.exists():
            raise DataError(f"there is no {path}. Give the folder of a run, runs/NAME.")
        history, steps, evaluations, heads, lens = cls(), {}, {}, {}, {}
        is_first = True  # logged step of a start
        for row in read_rows(path):
            if wrong := next(misfits(row, ROW), None):
                raise DataError(f"{path} has a row that is of no run: {wrong}.")
            if row.get("event") == "start":
                history.facts = {"world_size": row.get("world_size"), **row.get("facts", {})}
                is_first = True
            hours = history._take_time(number(row.get("time")))
            if "step" not in row or "tokens" not in row:
                continue
            if "train/loss" in row:
                rate = math.nan if is_first else number(row.get("throughput/tokens_per_sec"))
                steps[row["step"]] = {**row, "hours": hours, "warm_rate": rate}
                is_first = False
            if f"probe/{HEADS[0]}" in row:
                scores = {name: number(row.get(f"probe/{name}")) for name in HEADS}
                heads[row["step"]] = {"step": row["step"], **scores}
            if losses := [number(row[name]) for name in _lens_names(row)]:
                lens[row["step"]] = {"step": row["step"], "losses": losses}
            for key in row:
                if key.startswith("val/") and key.endswith("/loss"):
                    name = key.removeprefix("val/").removesuffix("/loss")
                    evaluations[name, row["step"]] = {
                        "step": row["step"],
                        "tokens": row["tokens"],
                        "hours": hours,
                        "scored": number(row.get(f"val/{name}/tokens")),
                        **_scores(row, f"val/{name}/"),
                    }
        if not steps:
            raise DataError(f"{path} holds no logged step yet: ask again after the first.")
        history.steps = [steps[step] for step in sorted(steps)]
        history.heads = [heads[step] for step in sorted(heads)]
        history.lens = [lens[step] for step in sorted(lens)]
        if (run_dir / "evaluation.json").exists():
            history.final = _final(run_dir / "evaluation.json")
        for name, step in sorted(evaluations):
            history.evaluations.setdefault(name, []).append(evaluations[name, step])
        return history

    def column(self, key: str) -> list[float]:
        """One value of every logged step, NaN where it is not known."""
        return [number(row.get(key)) for row in self.steps]

    @property
    def tokens_per_sec(self) -> float:
        """Median over the logged steps, without each process's first, which warms up."""
        warm = [rate for rate in self.column("warm_rate") if math.isfinite(rate)]
        rates = sorted(warm or self.column("throughput/tokens_per_sec"))
        return rates[len(rates) // 2]

    def _take_time(self, time: float) -> float:
        """Hours since the first start; NaN where a row does not say when it was written."""
        if math.isfinite(time):
            self.began = time if math.isnan(self.began) else self.began
            self.ended = time
        return (time - self.began) / 3600


def rows_until(path: Path, step: int) -> list[Row]:
    """What a metrics.jsonl has by step, ascending, up to `step`; of what stands twice, the later.

    Empty where there is no such file, or it cannot be read now.
    """
    rows: dict[int, Row] = {}
    try:
        found = read_rows(path)
    except DataError:
        return []
    for row in found:
        if next(misfits(row, {"step": range(step + 1), "tokens": COUNT, "time": float}), None):
            continue  # a start, or behind `step`
        if not 0 <= row["time"] < LATEST:
            continue
        at = At(row.pop("step"), row.pop("tokens"), row.pop("time"))
        before = rows.get(at.step, Row(at, {}))
        rows[at.step] = Row(at, before.values | row)
    return [rows[number] for number in sorted(rows)]


def has_evaluation(run_dir: Path, step: int, *, names: Sequence[str]) -> bool:
    """Whether metrics.jsonl has the held-out loss of each dataset after `step`."""
    try:
        rows = [row for row in read_rows(run_dir / "metrics.jsonl") if row.get("step") == step]
    except DataError:  # it is not there, or cannot be read now
        return False
    return all(any(f"val/{name}/loss" in row for row in rows) for name in names)


def _lens_names(row: dict[str, Any]) -> list[str]:
    """lens/loss_0, lens/loss_1, ..., as many as a row has, MOST_BLOCKS at most."""
    names: list[str] = []
    while len(names) < MOST_BLOCKS and (name := f"lens/loss_{len(names)}") in row:
        names.append(name)
    return names


def _final(path: Path) -> dict[str, dict[str, Any]]:
    """Dataset to its scores in an evaluation.json.

    Raises:
        DataError: it is not what pipeline.evaluate writes.
    """
    content = read_object(
        path, EVALUATION, error=DataError, misfit="is not what pipeline.evaluate writes"
    )
    return {
        name: {"tokens": row["tokens"], **_scores(row)} for name, row in content["results"].items()
    }


def _scores(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Loss, perplexity, bits per byte and, where a row has it, the share of exact answers."""
    keys = [*_SCORES, *(["exact"] if row.get(f"{prefix}exact") is not None else [])]
    return {key: number(row.get(prefix + key)) for key in keys}


def number(value: Any) -> float:
    """A value that can be drawn: NaN for what is none, or larger than any picture."""
    is_one = type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e30
    return float(value) if is_one else math.nan
