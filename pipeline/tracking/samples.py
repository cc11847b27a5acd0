"""What a model wrote while it was trained: runs/NAME/samples.jsonl, a line a sample.

{"step": 500, "tokens": 4096000, "number": 0, "prompt": "Once", "text": " upon a time"}
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pipeline.errors import DataError
from pipeline.shapes import COUNT, misfits
from pipeline.tracking.row_file import read_rows

SAMPLES = "samples.jsonl"
"""Of a run's folder."""
ROW = {"step": COUNT, "tokens": COUNT, "number": COUNT, "prompt": str, "text": str}
"""number: of the prompt among those of the run."""


class Sample(NamedTuple):
    """One prompt, and what the model wrote after it."""

    prompt: str
    text: str


def read_samples(run_dir: Path) -> dict[int, list[Sample]]:
    """Step to its samples, ascending; of a step that was repeated, the later ones.

    Empty where the run drew none.

    Raises:
        DataError: the file cannot be read, or has a row of something else.
    """
    path = run_dir / SAMPLES
    found: dict[int, dict[int, Sample]] = {}
    if not path.exists():
        return {}
    for row in read_rows(path):
        if wrong := next(misfits(row, ROW), None):
            raise DataError(f"{path} has a row that is no sample: {wrong}.")
        if row["number"] == 0:  # the first of a start's; another start may have had more
            found[row["step"]] = {}
        sample = Sample(row["prompt"], row["text"])
        found.setdefault(row["step"], {})[row["number"]] = sample
    return {step: list(found[step].values()) for step in sorted(found)}
