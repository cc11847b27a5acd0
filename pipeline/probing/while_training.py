"""Scores of attention heads and the logit lens of a model while it is trained, at any layout.

    repeated random tokens -> engine.evaluate, queries and keys kept -> a few numbers
    held-out text -> engine.row_losses, each block's stream in rows of its own -> a loss a block

No weight is gathered: what is read, the forward pass of every runner makes. An evaluation leaves
nothing behind in training (engine/forward_only.py).

L blocks, R rows of text, S sequence, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.model.names import canonical_name
from pipeline.model.stage_io import StageSchema
from pipeline.probing.heads import KINDS, LOOKS, kinds, looks, of_all_heads, repeated_tokens
from pipeline.probing.measures import over_ranks
from pipeline.probing.passage import BlockPassage, Hook, Passage, hooked

if TYPE_CHECKING:
    from pipeline.engine.engine import Engine

PLACES = re.compile(r"(?:embedding|layers\.(\d+))\.?")  # a pipeline's layers end with a dot
CORE = re.compile(r"layers\.(\d+)\.self_attention\.core_attention")


class HeadProbe:
    """Looks at the heads of an engine's model. Methods are collective: call on every rank."""

    def __init__(self, engine: Engine, schema: StageSchema) -> None:
        """Find the heads of this rank.

        Args:
            schema: which fields the engine's batches have.
        """
        self.engine, self.schema = engine, schema
        size = engine.model.num_attention_heads // engine.layout.tensor.size
        first = engine.layout.tensor.rank * size
        self._heads = range(first, first + size)
        num_layers = engine.model.num_layers
        self._cores = {
            int(match[1]): module
            for name, module in engine.runner.module.named_modules()
            if (match := CORE.fullmatch(canonical_name(name, num_layers=num_layers)))
        }

    def run(self) -> dict[str, float]:
        """probe/previous, duplicate, induction: the strongest head's score; entropy, sink: means.

        All on repeated random tokens; the scores are heads.py's. The same on every rank.
        """
        tables = self.scores()
        found = {name: tables[name].amax() for name in KINDS}
        found |= {name: tables[name].mean() for name in LOOKS}
        values = torch.stack(list(found.values())).tolist()  # one wait for the device
        return {f"probe/{name}": value for name, value in zip(found, values, strict=True)}

    def scores(self) -> dict[str, Tensor]:
        """Each of KINDS and LOOKS by (block, head), fp64, the same on every rank."""
        layout, model = self.engine.layout, self.engine.model
        shape = self.engine.shape
        ids, half = repeated_tokens(
            shape.vocab_size, seq_len=shape.seq_len, parts=self.schema.sequence_ranks
        )
        batch = Batch.of_whole_sequences(
            ids.to(layout.device),
            loss_mask=None,
            documents=self.schema.documents,
            positions=self.schema.positions,
        )
        weights = torch.ones(ids.shape, device=layout.device)
        weights[:, 2 * half :] = 0.0
        passage: Passage = {}

        def keep(number: int) -> Any:
            def hook(module: Any, inputs: Any, _out: Any) -> None:
                passage[number] = BlockPassage()
                passage[number].note(module, inputs)

            return hook

        with ExitStack() as hooks:
            for number, core in self._cores.items():
                hooks.enter_context(hooked(core, keep(number)))
            self.engine.evaluate([batch])
        size = (model.num_layers, model.num_attention_heads)
        found = {
            n: torch.zeros(size, dtype=torch.float64, device=layout.device)
            for n in (*KINDS, *LOOKS)
        }
        of_all_heads(
            passage, lambda attention: kinds(attention, half) | looks(attention, weights), found,
            heads=self._heads,
        )  # fmt: skip
        found = over_ranks(found, layout)
        later = weights[:, 1:].sum()
        tokens = {"entropy": weights.sum(), "sink": later}
        copies = layout.data.size  # every data-parallel rank reads the same
        return {name: value / copies / tokens.get(name, 1.0) for name, value in found.items()}


class LensProbe:
    """Reads every block of an engine's model. Methods are collective: call on every rank.

    The head may lie on another rank than a block. So the micro-batch has its rows once for every
    block, and the blocks compute the first copy only: what comes out of a block is written into
    rows that later blocks leave as they are. These travel from stage to stage and through final
    norm and head as rows of a batch do, whoever holds the weights.
    """

    def __init__(self, engine: Engine, schema: StageSchema, text: Batch) -> None:
        """Find the embedding and the blocks of this rank.

        Args:
            schema: which fields the engine's batches have.
            text: R rows, the same on every rank; its loss_mask says which labels count.
        """
        assert text.loss_mask is not None
        self.engine, self._num_layers = engine, engine.model.num_layers
        self._rows, self._labels = len(text.tokens), text.loss_mask.double().sum()
        self._text = text.repeated(self._num_layers)
        self._rows_of_hidden = 1 if schema.sequence_ranks > 1 else 0  # dimension
        self._modules: dict[int, Any] = {}  # by block; -1: embedding
        for name, module in engine.runner.module.named_modules():
            if match := PLACES.fullmatch(canonical_name(name, num_layers=self._num_layers)):
                self._modules[int(match[1] or -1)] = module

    def run(self) -> dict[str, float]:
        """lens/loss_N: nats per label, were block N the last; the same on every rank."""
        with ExitStack() as hooks:
            for number, module in self._modules.items():
                before, after = self._around(number)
                hooks.enter_context(hooked(module, before, before=True))
                hooks.enter_context(hooked(module, after))
            sums = self.engine.row_losses(self._text)
        # The first rows went through all blocks, those behind them left after block 0, 1, ...
        losses = sums.view(self._num_layers, self._rows).double().sum(1).roll(-1) / self._labels
        return {f"lens/loss_{number}": loss for number, loss in enumerate(losses.tolist())}

    def _around(self, number: int) -> tuple[Hook, Hook]:
        """What is done before and after the module of a block, or of the embedding (-1)."""
        whole: list[Any] = []  # the fields of all rows, while the module has those of the first

        def before(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            is_packed = isinstance(inputs[0], tuple)
            whole[:] = inputs[0] if is_packed else inputs
            first = tuple(self._first_rows(whole, is_embedding=number < 0))
            return (first,) if is_packed else first

        def after(_module: Any, _inputs: Any, out: Any) -> Any:
            hidden, *others = out if isinstance(out, tuple) else (out,)
            if number < 0:
                rows = self._rows_of_hidden
                streams = torch.cat([hidden] * self._num_layers, dim=rows)
                others = [field.repeat(self._num_layers, 1) for field in others]
            else:
                streams, others = whole[0], whole[1:] if others else []
                self._rows_of(streams, 0).copy_(hidden)
                if number + 1 < self._num_layers:
                    self._rows_of(streams, number + 1).copy_(hidden)
            return (streams, *others) if isinstance(out, tuple) else streams

        return before, after

    def _first_rows(self, fields: list[Any], *, is_embedding: bool) -> Iterator[Any]:
        """A module's arguments, of the first R rows; a block's first one is hidden."""
        for place, field in enumerate(fields):
            if field is None:
                yield None
            elif place == 0 and not is_embedding:
                yield self._rows_of(field, 0).contiguous()
            else:
                yield field[: self._rows]

    def _rows_of(self, hidden: Tensor, copy: int) -> Tensor:
        """A view of the R rows of one copy."""
        return hidden.narrow(self._rows_of_hidden, copy * self._rows, self._rows)
