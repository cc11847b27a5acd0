"""What a model wrote while it was trained: runs/NAME/samples.jsonl, a line a sample.

{"step": 500, "tokens": 4096000, "prompt": "Once", "text": " upon a time"}
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pipeline.errors import DataError
from pipeline.shapes import COUNT, misfits
from pipeline.tracking.row_file import read_rows

SAMPLES = "samples.jsonl"
"""Of a run's folder."""
ROW = {"step": COUNT, "tokens": COUNT, "prompt": str, "text": str}


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
    found: dict[tuple[int, str, int], Sample] = {}
    if not path.exists():
        return {}
    previous, number = None, 0
    for row in read_rows(path):
        if wrong := next(misfits(row, ROW), None):
            raise DataError(f"{path} has a row that is no sample: {wrong}.")
        # The same prompt may stand twice in the settings.
        here = (row["step"], row["prompt"])
        number = number + 1 if here == previous else 0
        previous = here
        found[row["step"], row["prompt"], number] = Sample(row["prompt"], row["text"])
    by_step: dict[int, list[Sample]] = {}
    for step, prompt, number in sorted(found, key=lambda key: key[0]):
        by_step.setdefault(step, []).append(found[step, prompt, number])
    return by_step
