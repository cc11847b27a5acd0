"""Forward passes that leave nothing behind: evaluation at any layout.

    batches -> this rank's stages, one after the other -> sum of weights * cross entropy

No schedule, no counter, no buffer of the training engine takes part, so that training after an
evaluation goes on as if there had been none, and any number of micro-batches will do. A stage takes
all micro-batches in turn before the next stage of the same rank does (DualPipeV has two): with m
micro-batches on p ranks of s stages each that lasts s (m + p - 1) passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.distributed.layout import ParallelLayout
from pipeline.model.stage_io import Packed, StageInput, StageSchema

if TYPE_CHECKING:
    from pipeline.data.batch import Batch


@dataclass(frozen=True)
class Stage:
    """Neighbouring layers of the model on this rank."""

    run: Callable[[Packed], Packed]
    previous: int | None
    """Pipeline rank of the stage before; None: this one takes the batch."""
    next: int | None
    """Pipeline rank of the stage after; None: this one's hidden goes into the loss."""


@contextmanager
def asking(module: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; every submodule's mode is afterwards what it was."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def sum_losses(
    stages: Sequence[Stage],
    loss: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor],
    batches: Sequence[Batch],
    weights: Sequence[Tensor],
    *,
    schema: StageSchema,
    hidden_size: int,
    dtype: torch.dtype,
    layout: ParallelLayout,
) -> Tensor:
    """0-dim fp32 sum of weights * cross entropy over all ranks; the caller is `asking`.

    Collective: call on every rank.

    Args:
        stages: of this rank, in the order of the model.
        loss: (hidden, (labels, weights)) to the sum of a micro-batch.
        batches: this data-parallel rank's micro-batches, the same on every pipeline rank.
        weights: (B, S) fp32 each.
        schema: what travels between stages; here only hidden does, all ranks have the batch.
        hidden_size, dtype: of hidden.
    """
    here = layout.pipeline.rank
    total = torch.zeros((), device=layout.device)
    handed_over: list[Tensor] = []  # from a stage of this rank to the next one of this rank
    for stage in stages:
        received, handed_over = handed_over, []
        sends: list[tuple[Any, Tensor]] = []  # a tensor must live until it is sent
        for number, batch in enumerate(batches):
            if stage.previous is None:
                packed = schema.first.pack(_fields(batch))
            else:
                hidden = (
                    received[number]
                    if stage.previous == here
                    else _receive(batch, stage.previous, schema, hidden_size, dtype, layout)
                )
                packed = schema.between.pack(
                    StageInput(hidden=hidden, document_ids=batch.document_ids)
                )
            out = stage.run(packed)
            if stage.next is None:
                assert isinstance(out, Tensor)
                total += loss(out, (batch.labels, weights[number]))
                continue
            after = schema.between.unpack(out).hidden
            assert after is not None
            if stage.next == here:
                handed_over.append(after)
            else:
                after, group = after.contiguous(), layout.pipeline.group
                sends.append((dist.isend(after, group=group, group_dst=stage.next), after))
        for work, _ in sends:
            work.wait()
    # One stage has the sum, the others have 0; data-parallel ranks have sums of their own.
    for axis in (layout.pipeline, layout.data):
        if axis.size > 1:
            dist.all_reduce(total, group=axis.group)
    return total


def _fields(batch: Batch) -> StageInput:
    return StageInput(
        tokens=batch.tokens, document_ids=batch.document_ids, positions=batch.positions
    )


def _receive(
    batch: Batch,
    source: int,
    schema: StageSchema,
    hidden_size: int,
    dtype: torch.dtype,
    layout: ParallelLayout,
) -> Tensor:
    """Hidden of a micro-batch from another rank, in the model's layout."""
    sequences, length = batch.tokens.shape
    ranks = schema.sequence_ranks
    shape = (length // ranks, sequences) if ranks > 1 else (sequences, length)
    hidden = torch.empty(*shape, hidden_size, dtype=dtype, device=layout.device)
    dist.recv(hidden, group=layout.pipeline.group, group_src=source)
    return hidden
