"""Each context-parallel rank's run of the sequences that its part of the batch brings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.distributed.layout import Axis

if TYPE_CHECKING:
    from pipeline.data.batch import Batch

CUT = ("tokens", "labels", "loss_mask", "positions")


def own_runs(batches: Sequence[Batch], context: Axis) -> list[Batch]:
    """The micro-batches as this rank computes them: run `context.rank` of `context.size`.

    What belongs to a token is cut; `document_ids` stays whole, for attention sees whole sequences.
    The peers were given the same batches.
    """
    if context.size == 1:
        return list(batches)
    return [_own_run(batch, context) for batch in batches]


def _own_run(batch: Batch, context: Axis) -> Batch:
    own = copy.copy(batch)
    for name in CUT:
        whole: Tensor | None = getattr(batch, name)
        if whole is not None:
            setattr(own, name, whole.chunk(context.size, dim=1)[context.rank].contiguous())
    return own
