"""Scores of attention heads while a model is trained, at any layout.

    repeated random tokens -> engine.evaluate, queries and keys kept -> a few numbers

Nothing is read but queries and keys, which the forward pass of every runner makes: no weight is
gathered, and an evaluation leaves nothing behind in training (engine/forward_only.py).
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.model.names import canonical_name
from pipeline.model.stage_io import StageSchema
from pipeline.probing.heads import KINDS, LOOKS, kinds, looks, of_all_heads, repeated_tokens
from pipeline.probing.measures import over_ranks
from pipeline.probing.passage import BlockPassage, Passage, hooked

if TYPE_CHECKING:
    from pipeline.engine.engine import Engine

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
