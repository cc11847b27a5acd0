"""From a checkpoint into this rank's fragments, whatever layout wrote it and which runs now.

Each function touches this rank's memory only; the caller lets all ranks agree, then publishes the
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoint.adapters import ModelTensors
from pipeline.checkpoint.record import CheckpointRecord, read_record
from pipeline.checkpoint.tensors import CheckpointTensors
from pipeline.config.parameter_names import is_lora
from pipeline.engine import state
from pipeline.engine.weights import Weights
from pipeline.errors import CheckpointError
from pipeline.model.fragments import chunks_of

if TYPE_CHECKING:
    from pipeline.engine.engine import Engine

Sources = Callable[[str], str | None]
"""Canonical name -> what a parameter is called where it is read; None: it keeps its values."""


def read_state(engine: Engine, folder: Path) -> CheckpointRecord:
    """Fill this rank's views of weights and optimizer state, and the loss scale; the record."""
    record, tensors = read_record(folder), CheckpointTensors(folder)
    _check_parameters(_trained(engine), tensors.parameters, folder)
    if record.optimizer != engine.optimizer_name:
        raise CheckpointError(
            f"{folder} was saved with optimizer.name={record.optimizer}, this run has "
            f"{engine.optimizer_name}: its optimizer state does not fit. To go on with "
            "the weights only, give another name=... and checkpoint.init_from=..."
        )
    state.create_state(engine, tensors.optimizer_keys, optimizer_step=record.optimizer_step)
    tensors.read_into(
        chunk
        for fragment in state.fragments(engine)
        for chunk in chunks_of(
            fragment, ["weight", *state.keys_of(engine, fragment.name, tensors.optimizer_keys)]
        )
    )
    if engine.loss_scale and record.loss_scale:
        engine.loss_scale.restore(record.loss_scale)
    return record


def read_weights(weights: Weights, tensors: ModelTensors, sources: Sources = str) -> None:
    """Fill this rank's views of the weights; low-rank matrices keep their initial values.

    Args:
        sources: of the tensors; as it stands, names are the same.
    """
    names = {name: sources(name) for name in weights.all_parameters() if not is_lora(name)}
    wanted = {name: source for name, source in names.items() if source is not None}
    _check_parameters(set(wanted.values()), tensors.parameters, tensors.folder)
    tensors.read_into(
        chunk
        for fragment in weights.fragments()
        if fragment.name in wanted
        for chunk in chunks_of(replace(fragment, name=wanted[fragment.name]), ["weight"])
    )


def _trained(engine: Engine) -> set[str]:
    """Canonical names of this rank's trained parameters."""
    named = engine.all_parameters().items()
    return {name for name, (parameter, _) in named if parameter.requires_grad}


def _check_parameters(names: set[str], saved: list[str], folder: Path) -> None:
    """Raise CheckpointError unless these parameters are in the checkpoint."""
    missing = sorted(names - set(saved))
    if missing:
        raise CheckpointError(
            f"{folder} has no "
            f"{missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}: it was written "
            "by another model. Give the model settings in its checkpoint.json, or another name to "
            "start anew."
        )
