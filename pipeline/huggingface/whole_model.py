"""The weights of a whole model from a checkpoint of any kind: whole, or an adapter of a base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.adapters import (
    Base,
    MergedTensors,
    ModelTensors,
    Read,
    base_of,
    find_base,
    recorded_base,
)
from pipeline.checkpoint.record import read_record
from pipeline.checkpoint.tensors import CheckpointTensors
from pipeline.config.model import ModelConfig
from pipeline.config.parameter_names import is_lora
from pipeline.errors import CheckpointError
from pipeline.huggingface.reader import HuggingFaceWeights


def whole_base(folder: Path) -> Base:
    """What a folder of weights is as a base, all of its bytes read and found whole.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if (folder / folders.SUMS).is_file() and (problems := folders.damage(folder)):
        raise CheckpointError(f"the base {folder} is damaged: {'; '.join(problems)}.")
    return base_of(folder)


def open_model(
    checkpoint: Path, *, base: Path | None = None, identify: Callable[[Path], Base] = whole_base
) -> ModelTensors:
    """The tensors of a checkpoint, those of an adapter merged with its base.

    Args:
        checkpoint: one checkpoint folder.
        base: where the base of an adapter is now; None: where it was when it was trained.
        identify: what a folder is as a base; ranks may share the work.

    Raises:
        CheckpointError: the base is missing, or is another one.
    """
    record, tensors = read_record(checkpoint), CheckpointTensors(checkpoint)
    wanted = recorded_base(record)
    if wanted is None:
        if not any(map(is_lora, tensors.parameters)):
            return tensors
        return MergedTensors(tensors, record, _nothing)
    folder = find_base(wanted, base)
    wanted.check(identify(folder))
    return MergedTensors(tensors, record, _reader(folder, record.model(), identify))


def _reader(folder: Path, model: ModelConfig, identify: Callable[[Path], Base]) -> Read:
    """How to read a weight of the base."""
    if (folder / "config.json").is_file():
        return HuggingFaceWeights(folder, model).tensor
    inner = open_model(folder, identify=identify)  # may itself be an adapter of another base
    return lambda name, _: inner.tensor(f"weights/{name}")


def _nothing(name: str, _: tuple[int, ...]) -> Tensor:
    raise CheckpointError(f"{name} is not in the checkpoint, and the checkpoint names no base.")
