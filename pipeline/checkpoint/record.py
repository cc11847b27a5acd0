"""checkpoint.json: everything of a checkpoint that is no tensor, for people and programs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

from pipeline.config.model import ModelConfig
from pipeline.errors import CheckpointError

RECORD = "checkpoint.json"
FORMAT = "pretrain-checkpoint"
VERSION = 1


def read_record(folder: Path) -> dict[str, Any]:
    """checkpoint.json of a checkpoint.

    Raises:
        CheckpointError: it is missing, unreadable, or written by a newer version of this program.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / RECORD} cannot be read: {error}.") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError(f"{folder / RECORD} is not a checkpoint of this program.")
    if record.get("version", 0) > VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {record['version']}; "
            f"this program reads up to {VERSION}. Update it."
        )
    return record


def saved_model(record: dict[str, Any]) -> ModelConfig:
    """The architecture of a checkpoint, its vocabulary size filled in."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        node = OmegaConf.merge(OmegaConf.structured(ModelConfig), record["config"]["model"])
        model = cast(ModelConfig, OmegaConf.to_object(node))
    except (OmegaConfBaseException, KeyError) as error:
        raise CheckpointError(
            f"the model settings in {RECORD} are not understood: {error}."
        ) from error
    return dataclasses.replace(model, vocab_size=record["vocab_size"])
