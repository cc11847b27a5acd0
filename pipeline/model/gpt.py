"""The whole GPT of one tensor-parallel rank, as the plain engine runs it: tokens, labels -> loss.

A pipeline runs the same layers through stage_layers.py; parameter names are the canonical ones of
names.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config.choices import Init
from pipeline.model.architecture import Architecture
from pipeline.model.block import Block
from pipeline.model.context_parallel import context_group, gather_run
from pipeline.model.documents import document_starts
from pipeline.model.embedding import Embedding, Head
from pipeline.model.exact import count_exact
from pipeline.model.loss import Projection, linear_cross_entropy
from pipeline.model.predictions import final_logits, label_losses, score_labels
from pipeline.model.tensor_parallel import enter_output_projection

# (hidden, output weight, labels, token weights) to what is asked of them
LossFunction = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


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
            compiled=model.compile,
        )

    def __call__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor | None
    ) -> Tensor:
        """0-dim fp32; arguments as in `linear_cross_entropy`, hidden in the model's layout."""
        hidden = enter_output_projection(hidden, self.config)
        return linear_cross_entropy(hidden, weight, labels, token_weights, self.projection)

    def sums(self, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """(2,) fp32 [cross entropy, 0] over the tokens where `mask` (B, S) is 1."""
        nats = self(hidden, weight, labels, mask)
        return torch.stack([nats, torch.zeros_like(nats)])

    def sums_and_exact(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor
    ) -> Tensor:
        """(2,) fp32 [as in `sums`, answers that a greedy decoder would give word for word]."""
        hidden = enter_output_projection(hidden, self.config)
        nats, hits = score_labels(hidden, weight, labels, mask, self.projection)
        if (group := context_group()).size() == 1:
            return torch.stack([nats, count_exact(hits, mask)])
        # An answer may begin in one rank's run and end in another's: the first one counts for all.
        hits, mask = (gather_run(x.to(mask.dtype), group, dim=1) for x in (hits, mask))
        return torch.stack([nats, count_exact(hits > 0, mask) * (group.rank() == 0)])

    def row_sums(self, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """(B,) fp32 cross entropy of each row's tokens where `mask` (B, S) is 1."""
        hidden = enter_output_projection(hidden, self.config)
        return (label_losses(hidden, weight, labels, self.projection) * mask).sum(1)

    def next_logits(self, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """(B * V,) fp32 logits of what follows the one token of each row where `mask` is 1."""
        hidden = enter_output_projection(hidden, self.config)
        if (group := context_group()).size() > 1:
            hidden, mask = (gather_run(x, group, dim=1) for x in (hidden, mask))
        rows = torch.arange(len(hidden), device=hidden.device)
        last = hidden[rows, mask.argmax(dim=1)]
        return final_logits(last, weight, self.projection).flatten()


Measure = Callable[[Loss, Tensor, Tensor, Tensor, Tensor], Tensor]
"""A method of Loss: (hidden, output weight, labels, mask) to fp32 numbers that add up."""


class GPT(nn.Module):
    """The whole model of one tensor-parallel rank."""

    def __init__(self, architecture: Architecture, tensor_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.embedding = Embedding(architecture)
        self.layers = nn.ModuleList(
            Block(architecture, layer=i) for i in range(architecture.model.num_layers)
        )
        self.head = Head(architecture)
        self.loss = Loss(architecture, tensor_group)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        token_weights: Tensor | None = None,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        images: Tensor | None = None,
        patch_ids: Tensor | None = None,
        *,
        loss: LossFunction | None = None,
    ) -> Tensor:
        """0-dim loss. Each argument but `images` is (B, S); token_weights None is the mean.

        images: (B, pictures, 3, size, size) uint8.
        loss: what is computed from hidden in its place, such as `self.loss.sums`.
        """
        hidden = self.embedding(tokens, positions, images, patch_ids)
        starts = None if document_ids is None else document_starts(document_ids)
        for layer in self.layers:
            hidden = layer(hidden, starts)
        hidden = self.head(hidden)
        return (loss or self.loss)(hidden, self.output_weight, labels, token_weights)

    @property
    def output_weight(self) -> nn.Parameter:
        """(V / tensor_parallel_size, H): the head's own weight, or the word embedding's."""
        return self.embedding.word.weight if self.head.word is None else self.head.word.weight
