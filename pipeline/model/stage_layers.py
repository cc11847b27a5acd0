"""The layers of a GPT as a pipeline runs them.

    StageEmbedding -> StageBlock x num_layers -> StageHead

They are the layers of gpt.py with one argument: what stage_io.py packed. config/stages.py says
which stage holds which of them.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.model.architecture import Architecture
from pipeline.model.block import Block
from pipeline.model.documents import document_starts
from pipeline.model.embedding import Embedding, Head
from pipeline.model.stage_io import Packed, StageInput, StageSchema


class StageEmbedding(Embedding):
    """Embedding of a batch's packed fields."""

    def __init__(
        self, architecture: Architecture, schema: StageSchema, *, is_first: bool = True
    ) -> None:
        super().__init__(architecture, is_first=is_first)
        self.packing, self.packing_after = schema.first, schema.between

    def forward(self, packed: Packed) -> Packed:  # type: ignore[override]
        """Packed hidden, and what the blocks need besides."""
        given = self.packing.unpack(packed)
        assert given.tokens is not None
        hidden = super().forward(given.tokens, given.positions, given.images, given.patch_ids)
        return self.packing_after.pack(StageInput(hidden=hidden, document_ids=given.document_ids))


class StageBlock(Block):
    """Block that hands on what the later ones need."""

    def __init__(self, architecture: Architecture, schema: StageSchema, layer: int) -> None:
        super().__init__(architecture, layer=layer)
        self.packing = schema.between

    def forward(self, packed: Packed) -> Packed:  # type: ignore[override]
        """The same fields, hidden after the block."""
        given = self.packing.unpack(packed)
        ids = given.document_ids
        assert given.hidden is not None
        hidden = super().forward(given.hidden, None if ids is None else document_starts(ids))
        return self.packing.pack(StageInput(hidden=hidden, document_ids=ids))


class StageHead(Head):
    """Head that lets go of everything but hidden."""

    def __init__(self, architecture: Architecture, schema: StageSchema) -> None:
        super().__init__(architecture)
        self.packing = schema.between

    def forward(self, packed: Packed) -> Tensor:
        """Hidden, normalised."""
        given = self.packing.unpack(packed)
        assert given.hidden is not None
        return super().forward(given.hidden)
