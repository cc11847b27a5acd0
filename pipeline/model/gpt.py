"""The GPT, whole for the plain engine or as a list of layers for a pipeline, under one set of layout-free names.

    GPT             tokens, labels -> loss
    stage layers    StageEmbedding -> StageBlock x num_layers -> StageHead, cut into stages by model/stages.py; between
                    them travels hidden, or (hidden, document_ids) when attention stays inside documents

Canonical parameter names do not depend on the layout: embedding.word.weight, embedding.position.weight,
layers.<i>.<module>.<parameter>, final_norm.weight, head.weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import Init, ModelConfig, ParallelConfig, TrainingConfig
from pipeline.model.layers import (
    Block,
    Embedding,
    Head,
    TransformerConfig,
    transformer_config,
)
from pipeline.model.loss import Projection, linear_cross_entropy
from pipeline.model.parallel import enter_output_projection


@dataclass(frozen=True)
class Architecture:
    """All that building a model, or a stage of it, needs."""

    model: ModelConfig
    parallel: ParallelConfig
    training: TrainingConfig
    vocab_size: int
    padded_vocab_size: int

    @property
    def transformer(self) -> TransformerConfig:
        """megatron-core's view of a block."""
        return transformer_config(self.model, self.parallel)


class Loss:
    """Weighted sum of the cross entropy, from hidden states in the model's layout."""

    def __init__(self, architecture: Architecture, tensor_group: dist.ProcessGroup) -> None:
        model = architecture.model
        self.config = architecture.transformer
        self.projection = Projection(
            vocab_size=architecture.vocab_size,
            softcap=model.logit_softcap,
            z_loss_coeff=model.z_loss_coeff,
            scale=model.mup_base_hidden_size / model.hidden_size if model.init is Init.mup else 1.0,
            group=tensor_group if tensor_group.size() > 1 else None,
        )

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor | None) -> Tensor:
        """0-dim fp32; arguments as in `linear_cross_entropy`, hidden in the model's layout."""
        hidden = enter_output_projection(hidden, self.config)
        return linear_cross_entropy(hidden, weight, labels, token_weights, self.projection)


class GPT(nn.Module):
    """The whole model of one tensor-parallel rank."""

    def __init__(self, architecture: Architecture, tensor_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.embedding = StageEmbedding(architecture)
        self.layers = nn.ModuleList(StageBlock(architecture, i) for i in range(architecture.model.num_layers))
        self.head = StageHead(architecture)
        self.loss = Loss(architecture, tensor_group)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        token_weights: Tensor | None = None,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """0-dim loss. Each argument is (B, S); token_weights None is the mean."""
        hidden = self.embedding(tokens, positions)
        mask = None if document_ids is None else document_mask(document_ids)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        hidden = self.head(hidden)
        return self.loss(hidden, self.output_weight, labels, token_weights)

    @property
    def output_weight(self) -> nn.Parameter:
        """(V / tensor_parallel_size, H): the head's own weight, or the word embedding's."""
        return self.embedding.word.weight if self.head.word is None else self.head.word.weight


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
        super().__init__(architecture.transformer, architecture.model, architecture.training, layer=layer)
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
        super().__init__(architecture.transformer, architecture.model, padded_vocab_size=architecture.padded_vocab_size)

    def forward(self, hidden: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Hidden, normalised."""
        return super().forward(hidden if isinstance(hidden, Tensor) else hidden[0])


def document_mask(document_ids: Tensor) -> Tensor:
    """(B, 1, S, S) bool: a query sees keys of its own document that are not later."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    size = document_ids.shape[1]
    return same & torch.ones(size, size, dtype=torch.bool, device=document_ids.device).tril()


def canonical_name(name: str, *, num_layers: int) -> str:
    """The layout-free name of a parameter of a GPT or of a pipeline module.

    PipelineModule numbers its layers: 0 embedding, 1 .. num_layers blocks, num_layers + 1 head; tied modules have
    names of their own.
    """
    name = name.removeprefix("tied_modules.")
    first, _, rest = name.partition(".")
    if first.isdigit():
        index = int(first)
        if index == 0:
            name = f"embedding.{rest}"
        elif index <= num_layers:
            name = f"layers.{index - 1}.{rest}"
        else:
            name = f"head.{rest}"
    return name.replace("head.norm.", "final_norm.").replace("head.word.", "head.")
