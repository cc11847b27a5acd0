"""Forward passes that leave nothing behind: evaluation at any layout.

    batches -> this rank's stages, one after the other -> Scores: sums over all ranks

No schedule, no counter, no buffer of the training engine takes part, so that training after an
evaluation goes on as if there had been none, and any number of micro-batches will do. A stage takes
all micro-batches in turn before the next stage of the same rank does (DualPipeV has two): with m
micro-batches on p ranks of s stages each that lasts s (m + p - 1) passes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config.choices import Precision
from pipeline.config.stages import layer_costs, partition
from pipeline.config.vision import images_per_row
from pipeline.distributed.layout import ParallelLayout
from pipeline.distributed.waits import wait_for
from pipeline.engine.counting import count_all, count_documents, loss_masks
from pipeline.engine.own_runs import own_runs
from pipeline.engine.weights import named_parameters, partition_of
from pipeline.model.architecture import Architecture
from pipeline.model.attention import pin_attention_kernels
from pipeline.model.context_parallel import gather_run
from pipeline.model.documents import expect_documents
from pipeline.model.fragments import WEIGHT, Fragment
from pipeline.model.gpt import Loss
from pipeline.model.initial_values import initialize, threads_for
from pipeline.model.partition import Partition
from pipeline.model.stage_io import Packed, StageInput, StageSchema
from pipeline.model.stage_layers import StageBlock, StageEmbedding, StageHead
from pipeline.model.tensor_parallel import gather_sequence

if TYPE_CHECKING:
    from pipeline.data.batch import Batch


DTYPES = {
    Precision.fp32: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
}


@dataclass(frozen=True)
class Stage:
    """Neighbouring layers of the model on this rank."""

    run: Callable[[Packed], Packed]
    previous: int | None
    """Pipeline rank of the stage before; None: this one takes the batch."""
    next: int | None
    """Pipeline rank of the stage after; None: this one's hidden goes into the loss."""


@dataclass(frozen=True)
class Scores:
    """What a model makes of batches: 0-dim fp32 sums over all ranks."""

    nats: Tensor
    """Cross entropy of the unmasked tokens."""
    tokens: Tensor
    """How many these are."""
    exact: Tensor
    """Answers that greedy decoding would give word for word; 0 where they were not asked for."""
    answers: Tensor
    """How many answers there are; likewise."""

    @classmethod
    def of(cls, sums: Tensor, tokens: Tensor, answers: Tensor | None) -> Scores:
        """From (2,) sums of [nats, exact answers]."""
        return cls(
            sums[0], tokens, sums[1], torch.zeros_like(tokens) if answers is None else answers
        )


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


def sum_scores(
    stages: Sequence[Stage],
    sums: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor],
    batches: Sequence[Batch],
    masks: Sequence[Tensor],
    *,
    schema: StageSchema,
    hidden_size: int,
    dtype: torch.dtype,
    layout: ParallelLayout,
    size: int = 2,
) -> Tensor:
    """(size,) fp32 sums over all ranks, of model/gpt.py's Loss. Collective; the caller is `asking`.

    Args:
        stages: of this rank, in the order of the model.
        sums: (hidden, (labels, mask)) to the sums of a micro-batch.
        batches: this copy's micro-batches, the same on every pipeline rank.
        masks: (B, S) fp32 each.
        schema: what travels between stages; here only hidden does, all ranks have the batch.
        hidden_size, dtype: of hidden.
        size: numbers that `sums` gives.
    """
    here = layout.pipeline.rank
    total = torch.zeros(size, device=layout.device)
    handed_over: list[Tensor] = []  # from a stage of this rank to the next one of this rank
    for stage in stages:
        received, handed_over = handed_over, []
        sends: list[tuple[Any, Tensor]] = []  # a tensor must live until it is sent
        for number, batch in enumerate(batches):
            if stage.previous is None:
                packed = schema.first.pack(first_input(batch))
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
                total += sums(out, (batch.labels, masks[number]))
                continue
            after = schema.between.unpack(out).hidden
            assert after is not None
            if stage.next == here:
                handed_over.append(after)
            else:
                after, group = after.contiguous(), layout.pipeline.group
                sends.append((dist.isend(after, group=group, group_dst=stage.next), after))
        wait_for(work for work, _ in sends)
    # One stage has the sums, the others have 0; copies of the model have sums of their own.
    for axis in (layout.pipeline, layout.replica):
        if axis.size > 1:
            dist.all_reduce(total, group=axis.group)
    return total


def first_input(batch: Batch) -> StageInput:
    """What the first stage is given of a micro-batch."""
    return StageInput(
        tokens=batch.tokens,
        document_ids=batch.document_ids,
        positions=batch.positions,
        images=batch.images,
        patch_ids=batch.patch_ids,
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


class _Layers(nn.Module):
    """A run of [embedding, blocks, head] and, where it ends with the head, the loss."""

    def __init__(
        self,
        architecture: Architecture,
        schema: StageSchema,
        places: range,
        tensor_group: dist.ProcessGroup,
    ) -> None:
        super().__init__()
        model = architecture.model
        is_first, is_last = 0 in places, model.num_layers + 1 in places
        self.embeds = is_first
        self.embedding = (
            StageEmbedding(architecture, schema, is_first=is_first)
            if is_first or (is_last and model.tied_embeddings)
            else None
        )
        blocks = [place - 1 for place in places if 0 < place <= model.num_layers]
        self.layers = nn.ModuleDict({str(i): StageBlock(architecture, schema, i) for i in blocks})
        self.head = StageHead(architecture, schema) if is_last else None
        self.cross_entropy = Loss(architecture, tensor_group)

    def forward(self, packed: Packed) -> Packed:
        if self.embeds:
            assert self.embedding is not None
            packed = self.embedding(packed)
        for block in self.layers.values():
            packed = block(packed)
        return packed if self.head is None else self.head(packed)

    @property
    def output_weight(self) -> nn.Parameter:
        assert self.head is not None
        holder = self.embedding if self.head.word is None else self.head
        assert holder is not None and holder.word is not None
        return holder.word.weight


class ForwardOnly:
    """A model that is only asked: one copy of its weights, in the precision it computes in.

    No optimizer, no moments, no gradients, no fp32 copy; at any tensor and pipeline parallelism,
    with a copy of the model for each part of the batch. Methods are collective.
    """

    def __init__(
        self,
        architecture: Architecture,
        schema: StageSchema,
        layout: ParallelLayout,
        *,
        seq_len: int,
        seed: int | None = None,
    ) -> None:
        """Build this rank's stage.

        Args:
            seq_len: of the batches; stages are cut by what their layers cost.
            seed: of the initial weights; None: they are loaded next, and are 0 until then.
        """
        self.model, self.schema, self.layout = architecture.model, schema, layout
        pin_attention_kernels()
        costs = layer_costs(
            self.model,
            padded_vocab_size=architecture.padded_vocab_size,
            seq_len=seq_len,
            images_per_row=images_per_row(self.model, seq_len, None),
        )
        self._bounds = bounds = partition(costs, layout.pipeline.size)
        here = layout.pipeline.rank
        self.dtype = DTYPES[architecture.precision]
        places = range(bounds[here], bounds[here + 1])
        self.module = _Layers(architecture, schema, places, layout.tensor.group)
        self.module.to(layout.device, self.dtype).requires_grad_(False)
        self._parameters = {}
        for name, parameter in named_parameters(self.module, self.model):
            part = partition_of(name, parameter, layout, vocab_size=architecture.vocab_size)
            self._parameters[name] = (parameter, part)
            if seed is not None:
                threads = threads_for(layout.ranks.local_world_size)
                initialize(parameter, name, part, model=self.model, seed=seed, num_threads=threads)
            else:  # rows of padding are in no checkpoint, and 0 times what memory held may be NaN
                parameter.zero_()

    def evaluate(self, batches: Sequence[Batch], *, answers: bool = False) -> Scores:
        """What these batches' unmasked tokens add up to; `answers`: their answers too."""
        expect_documents(count_documents(batches))
        count = count_all(batches, self.layout) if answers else None
        batches = own_runs(batches, self.layout.context, self.model)
        masks, tokens = loss_masks(batches, self.layout)
        loss = self.module.cross_entropy
        measure = loss.sums_and_exact if answers else loss.sums
        here, last = self.layout.pipeline.rank, self.layout.pipeline.size - 1
        stage = Stage(self.module, here - 1 if here else None, here + 1 if here < last else None)
        with asking(self.module):
            total = sum_scores(
                [stage],
                lambda hidden, labels: measure(hidden, self.module.output_weight, *labels),
                batches,
                masks,
                schema=self.schema,
                hidden_size=self.model.hidden_size,
                dtype=self.dtype,
                layout=self.layout,
            )
        return Scores.of(total, tokens, count)

    def hidden_states(self, batches: Sequence[Batch], *, layer: int) -> list[Tensor]:
        """(B, S, H) of each micro-batch after block `layer`; [] on ranks of other stages."""
        found: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, packed: Packed) -> None:
            hidden = self.schema.between.unpack(packed).hidden
            assert hidden is not None
            if self.schema.sequence_ranks > 1:
                hidden = gather_sequence(hidden)
            if self.layout.context.size > 1:
                hidden = gather_run(hidden, self.layout.context.group, dim=1)
            found.append(hidden)

        blocks = self.module.layers
        if str(layer) not in blocks:
            self.evaluate(batches)
            return found
        handle = blocks[str(layer)].register_forward_hook(keep)
        try:
            self.evaluate(batches)
        finally:
            handle.remove()
        return found

    def stage_of(self, block: int) -> int:
        """The pipeline rank that holds a block."""
        return bisect_right(self._bounds, block + 1) - 1  # the embedding is the first place

    def all_parameters(self) -> dict[str, tuple[nn.Parameter, Partition]]:
        """Canonical name -> (parameter, its partition) of this stage, tied copies included."""
        return self._parameters

    def fragments(self) -> list[Fragment]:
        """Views of the weights, in the precision of the model."""
        return [
            Fragment(name, part, 0, {WEIGHT: parameter.data.view(-1)}, False)
            for name, (parameter, part) in self._parameters.items()
        ]

    def publish_weights(self) -> None:
        """Nothing to do: the views are the weights that the model computes with."""
