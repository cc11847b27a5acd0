"""runs/NAME/memorization/CHECKPOINT.json: what was measured of a checkpoint.

pipeline.memorization writes it; the model card of an export reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.files import write_durably
from pipeline.shapes import read_object

_INTERVAL = {"value": float, "low": float, "high": float}
_ATTACK = {"auc": _INTERVAL, "tpr_at_1_percent_fpr": _INTERVAL}
_RATES = {"exact": _INTERVAL, "near": _INTERVAL}
SHAPE = {
    "step": range(2**53),
    "canaries": (
        None,
        {
            "chance": float,
            "most": float,
            "references": range(2**31),
            "repetitions": {str: {"canaries": range(2**31), **_INTERVAL}},
        },
    ),
    "extraction": [{"prefix": range(2**31), "read": _RATES, "held_out": _RATES}],
    "continuation": range(2**31),
    "windows": {"read": range(2**31), "held_out": range(2**31)},
    "membership": {"loss": _ATTACK, "min_k": _ATTACK, "reference?": _ATTACK},
}


def place_of(checkpoint: Path) -> Path:
    """Where the findings of a checkpoint are, whether or not they are there."""
    folder = checkpoint.resolve()
    root = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    return root / "memorization" / f"{folder.name}.json"


def write(findings: dict[str, Any], path: Path) -> None:
    """Write findings."""
    write_durably(path, (json.dumps(findings, indent=1) + "\n").encode())


def read(path: Path) -> dict[str, Any] | None:
    """The findings of a file; None: nothing was measured.

    Raises:
        DataError: the file is not what pipeline.memorization writes.
    """
    if not path.is_file():
        return None
    return read_object(
        path,
        SHAPE,
        error=DataError,
        misfit="is not what pipeline.memorization writes",
        advice="Remove it.",
    )
