"""The layers of a GPT as a pipeline cuts them: StageEmbedding -> StageBlock x num_layers -> StageHead.

Between them travels hidden, or (hidden, document_ids) when attention stays inside documents;
model/stages.py says which stage holds which layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.model.architecture import Architecture
from pipeline.model.block import Block
from pipeline.model.embedding import Embedding, Head


class StageEmbedding(Embedding):
    """Embedding that also takes a pipeline's packed input (tokens, document_ids, positions)."""

    def __init__(self, architecture: Architecture, with_positions: bool = True) -> None:
        super().__init__(
            architecture.transformer, architecture.model,
            padded_vocab_size=architecture.padded_vocab_size, with_positions=with_positions,
        )  # fmt: skip

    def forward(self, tokens: Tensor | tuple[Tensor, ...], positions: Tensor | None = None) -> Any:
        """Tensor hidden, or the tuple (hidden, document_ids)."""
        if isinstance(tokens, Tensor):
            return super().forward(tokens, positions)
        tokens, document_ids, *rest = tokens
        return super().forward(tokens, *rest), document_ids


class StageBlock(Block):
    """Block that also takes (hidden, document_ids) and passes the ids on."""

    def __init__(self, architecture: Architecture, layer: int) -> None:
        super().__init__(
            architecture.transformer, architecture.model, architecture.training, layer=layer
        )
        if architecture.model.compile:
            self.compile()

    def forward(self, hidden: Tensor | tuple[Tensor, Tensor], mask: Tensor | None = None) -> Any:
        """Tensor hidden, or the tuple (hidden, document_ids)."""
        if isinstance(hidden, Tensor):
            return super().forward(hidden, mask)
        hidden, document_ids = hidden
        return super().forward(hidden, document_mask(document_ids)), document_ids


class StageHead(Head):
    """Head that also takes (hidden, document_ids)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(
            architecture.transformer,
            architecture.model,
            padded_vocab_size=architecture.padded_vocab_size,
        )

    def forward(self, hidden: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Hidden, normalised."""
        return super().forward(hidden if isinstance(hidden, Tensor) else hidden[0])


def document_mask(document_ids: Tensor) -> Tensor:
    """(B, 1, S, S) bool: a query sees keys of its own document that are not later."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    size = document_ids.shape[1]
    return same & torch.ones(size, size, dtype=torch.bool, device=document_ids.device).tril()
