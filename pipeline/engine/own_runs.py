"""What a rank computes of the batch: its run of the sequences, and pictures whatever it brings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.config.model import ModelConfig
from pipeline.distributed.layout import Axis

if TYPE_CHECKING:
    from pipeline.data.batch import Batch

CUT = ("tokens", "labels", "loss_mask", "positions", "patch_ids")


def own_runs(batches: Sequence[Batch], context: Axis, model: ModelConfig) -> list[Batch]:
    """The micro-batches as this rank computes them: run `context.rank` of `context.size`.

    A model that reads pictures is given a blank one with text that brings none.

    What belongs to a token is cut; `document_ids` stays whole, for attention sees whole sequences,
    and so do `images`, of which each rank takes the patches that its tokens stand for.
    The peers were given the same batches.
    """
    if model.vision.num_layers:
        batches = [_with_pictures(batch, model) for batch in batches]
    if context.size == 1:
        return list(batches)
    return [_own_run(batch, context) for batch in batches]


def no_pictures(model: ModelConfig, tokens: Tensor, *, per_row: int = 1) -> dict[str, Tensor]:
    """Blank pictures and no placeholder, `images` and `patch_ids`, for text (B, S)."""
    shape = (len(tokens), per_row, 3, model.vision.image_size, model.vision.image_size)
    return {
        "images": torch.zeros(shape, dtype=torch.uint8, device=tokens.device),
        "patch_ids": torch.full_like(tokens, -1),
    }


def _with_pictures(batch: Batch, model: ModelConfig) -> Batch:
    if batch.images is not None:
        return batch
    seeing = copy.copy(batch)
    for name, blank in no_pictures(model, batch.tokens).items():
        setattr(seeing, name, blank)
    return seeing


def _own_run(batch: Batch, context: Axis) -> Batch:
    own = copy.copy(batch)
    for name in CUT:
        whole: Tensor | None = getattr(batch, name)
        if whole is not None:
            setattr(own, name, whole.chunk(context.size, dim=1)[context.rank].contiguous())
    return own
