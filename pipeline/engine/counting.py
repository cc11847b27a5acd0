"""What batches hold: tokens that count, answers, documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.distributed.layout import ParallelLayout
from pipeline.model.exact import count_answers

if TYPE_CHECKING:
    from pipeline.data.batch import Batch


def loss_mask_of(batch: Batch) -> Tensor:
    """(B, S) fp32, 1 where a token counts."""
    if batch.loss_mask is None:
        return torch.ones_like(batch.labels, dtype=torch.float32)
    return batch.loss_mask


def loss_masks(batches: Sequence[Batch], layout: ParallelLayout) -> tuple[list[Tensor], Tensor]:
    """([(B, S) fp32 loss mask], 0-dim sum of them over all copies of the model). Collective."""
    masks = [loss_mask_of(batch) for batch in batches]
    count = torch.stack([mask.sum() for mask in masks]).sum()
    dist.all_reduce(count, group=layout.replica.group)
    return masks, count


def count_documents(batches: Sequence[Batch]) -> list[int]:
    """Documents of each micro-batch that has any; at most one a token where nobody has counted."""
    return [b.num_documents or b.labels.numel() for b in batches if b.document_ids is not None]


def count_all(batches: Sequence[Batch], layout: ParallelLayout) -> Tensor:
    """0-dim fp32: answers in whole sequences, over all parts of the batch. Collective."""
    count = torch.stack([count_answers(loss_mask_of(batch)) for batch in batches]).sum()
    dist.all_reduce(count, group=layout.data.group)
    return count
