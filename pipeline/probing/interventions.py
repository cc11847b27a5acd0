"""What the model would say if a part of it were missing, or had seen another prompt.

    ablation  a head, an attention layer or an MLP adds nothing -> the loss
    patching  what passed by for one prompt is put into the run of another -> the answer comes back?

Meng et al. 2022, arXiv:2202.05262, and Wang et al. 2022, arXiv:2211.00593, patch like this.

B micro-batch, S sequence, H hidden, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.engine.forward_only import ForwardOnly
from pipeline.model.stage_io import Packed, StageInput
from pipeline.probing.passage import Passage, blocks_of, heads_here, hooked, look
from pipeline.probing.readout import Readout

if TYPE_CHECKING:
    from pipeline.data.batch import Batch

Losses = dict[str, list[Any]]


def ablate(model: ForwardOnly, batches: Sequence[Batch], *, alive: Callable[[], None]) -> Losses:
    """Mean loss with each part silent: it adds zeros. Collective: call on every rank.

    Returns:
        {"none": [loss], "attention": [by block], "mlp": [by block], "heads": [[by head] by block]}.
    """

    def loss(silenced: AbstractContextManager[Any]) -> float:
        with silenced:
            scores = model.evaluate(batches)
        alive()
        return float(scores.nats / scores.tokens)

    blocks, layers = blocks_of(model), range(model.model.num_layers)

    def silent(number: int, part: str) -> AbstractContextManager[Any]:
        if number not in blocks:  # on another stage
            return nullcontext()
        return hooked(getattr(blocks[number], part), _nothing)

    def silent_head(number: int, head: int) -> AbstractContextManager[Any]:
        here = heads_here(model)
        if number not in blocks or head not in here:
            return nullcontext()
        width = _head_width(model, blocks[number])
        place = slice((head - here.start) * width, (head - here.start + 1) * width)
        projection = blocks[number].self_attention.linear_proj
        return hooked(projection, lambda _m, inputs: _without(inputs[0], place), before=True)

    heads = range(model.model.num_attention_heads)
    return {
        "none": [loss(nullcontext())],
        "attention": [loss(silent(i, "self_attention")) for i in layers],
        "mlp": [loss(silent(i, "mlp")) for i in layers],
        "heads": [[loss(silent_head(i, head)) for head in heads] for i in layers],
    }


def _nothing(_module: Any, _inputs: Any, out: Any) -> Any:
    """Zeros in the place of what a part would add; experts return a bias beside it."""
    if isinstance(out, tuple):
        return (torch.zeros_like(out[0]), *out[1:])
    return torch.zeros_like(out)


def _without(context: Tensor, place: slice) -> tuple[Tensor]:
    context = context.clone()
    context[..., place] = 0.0
    return (context,)


def _head_width(model: ForwardOnly, block: Any) -> int:
    return int(block.self_attention.linear_proj.weight.shape[1]) // len(heads_here(model))


class Patching:
    """One prompt's activations in the run of another. Methods are collective."""

    def __init__(
        self, model: ForwardOnly, prompt: Batch, other: Batch, *, at: int, answer: int
    ) -> None:
        """Run both.

        Args:
            prompt: (1, S) tokens, whose activations are put in.
            other: (1, S), whose run they are put into.
            at: the place whose next token is asked for.
            answer: that token.
        """
        self.model, self.readout = model, Readout(model)
        self.other, self.at, self.answer = other, at, answer
        self.source = look(model, prompt)
        self.of_prompt = self._answers(self.source, prompt)[0]
        self.of_other = self._answers(look(model, other), other)[0]

    def streams(self, *, rows: int) -> list[list[float]]:
        """Log-probability of the answer by block and place: the residual stream there is patched.

        Args:
            rows: places that are tried together.
        """
        places = range(self.at + 1)
        return [
            [
                value
                for start in range(0, len(places), rows)
                for value in self._with_streams(block, places[start : start + rows])
            ]
            for block in range(self.model.model.num_layers)
        ]

    def heads(self, *, rows: int) -> list[list[float]]:
        """Log-probability of the answer by block and head: its output is patched at every place."""
        heads = range(self.model.model.num_attention_heads)
        return [
            [
                value
                for start in range(0, len(heads), rows)
                for value in self._with_heads(block, heads[start : start + rows])
            ]
            for block in range(self.model.model.num_layers)
        ]

    def _with_streams(self, number: int, places: range) -> list[float]:
        """Row r of a batch has place `places[r]` of the stream after block `number` patched."""
        schema, block = self.model.schema, blocks_of(self.model).get(number)
        splits_sequence = schema.sequence_ranks > 1

        def patch(_module: Any, _inputs: Any, packed: Packed) -> Packed:
            given = schema.between.unpack(packed)
            assert given.hidden is not None
            hidden = given.hidden.clone()
            # (B, S, H), a view: what is written into it is written into hidden.
            view = hidden.transpose(0, 1) if splits_sequence else hidden
            first = self.model.layout.tensor.rank * view.shape[1] if splits_sequence else 0
            source = self.source[number].after
            for row, place in enumerate(places):
                if 0 <= place - first < view.shape[1]:
                    view[row, place - first] = source[0, place]
            return schema.between.pack(StageInput(hidden=hidden, document_ids=given.document_ids))

        hook = nullcontext() if block is None else hooked(block, patch)
        return self._run(hook, len(places))

    def _with_heads(self, number: int, heads: range) -> list[float]:
        """Row r of a batch has head `heads[r]` of block `number` patched."""
        block, here = blocks_of(self.model).get(number), heads_here(self.model)
        splits_sequence = self.model.schema.sequence_ranks > 1

        def patch(_module: Any, inputs: Any) -> tuple[Tensor]:
            context = inputs[0].clone()
            view = context.transpose(0, 1) if splits_sequence else context
            width = _head_width(self.model, block)
            for row, head in enumerate(heads):
                if head in here:
                    place = slice((head - here.start) * width, (head - here.start + 1) * width)
                    view[row, :, place] = self.source[number].context[0, :, place]
            return (context,)

        hook: AbstractContextManager[Any] = nullcontext()
        if block is not None:
            hook = hooked(block.self_attention.linear_proj, patch, before=True)
        return self._run(hook, len(heads))

    def _run(self, hook: AbstractContextManager[Any], rows: int) -> list[float]:
        """Log-probabilities of the answer in a batch of `rows` copies of the other prompt."""
        batch = repeat_rows(self.other, rows)
        with hook:
            passage = look(self.model, batch)
        return self._answers(passage, batch)

    def _answers(self, passage: Passage, batch: Batch) -> list[float]:
        """Log-probability of the answer in each row, on every rank."""
        rows = len(batch.tokens)
        found = torch.zeros(rows, device=self.model.layout.device)
        last = self.model.model.num_layers - 1
        hidden = self.readout.bring(passage, last, (rows, batch.tokens.shape[1]))
        if hidden is not None:
            labels = torch.full_like(batch.labels[:, :1], self.answer)
            found = -self.readout.losses(hidden[:, self.at : self.at + 1], labels)[:, 0]
        axis = self.model.layout.pipeline
        if axis.size > 1:
            torch.distributed.broadcast(found, group=axis.group, group_src=axis.size - 1)
        return [float(value) for value in found]


def repeat_rows(batch: Batch, rows: int) -> Batch:
    """A batch of copies of its one row."""

    def copies(field: Tensor | None) -> Any:
        return None if field is None else field.expand(rows, -1).contiguous()

    return replace(
        batch, tokens=copies(batch.tokens), labels=copies(batch.labels),
        loss_mask=copies(batch.loss_mask), document_ids=copies(batch.document_ids),
        positions=copies(batch.positions),
    )  # fmt: skip
