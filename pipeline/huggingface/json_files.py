"""The JSON files of a Hugging Face folder: each holds one object, its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.files import write_durably
from pipeline.shapes import read_object


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    write_durably(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The settings of a file.

    Raises:
        CheckpointError: it cannot be read, is no JSON, or no object.
    """
    return read_object(path, {}, error=CheckpointError, misfit="holds no settings")
