"""Our own forward pass over a whole model, fp32, in one process: yardstick and sampling."""

from __future__ import annotations

import pipeline.distributed.lean_megatron  # noqa: F401

# isort: split
import os
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.choices import Precision
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig
from pipeline.config.parallel_sizes import ParallelSizes
from pipeline.config.training import ParallelConfig
from pipeline.distributed.layout import connect
from pipeline.distributed.ranks import Ranks
from pipeline.model.architecture import Architecture
from pipeline.model.gpt import GPT
from pipeline.model.lora import adapt
from pipeline.model.names import canonical_name


class LocalModel:
    """A GPT that answers with logits."""

    @torch.no_grad()
    def __init__(
        self,
        model: ModelConfig,
        weight: Callable[[str], Tensor],
        *,
        finetune: FinetuneConfig | None = None,
    ) -> None:
        """Build the model and copy its weights, one parameter at a time.

        Args:
            model: architecture, with vocab_size.
            weight: canonical name to whole parameter.
            finetune: with low-rank matrices beside the linears; None: without.
        """
        vocab_size = model.vocab_size
        assert vocab_size is not None
        alone = Ranks(0, 1, 0, 1, os.uname().nodename)
        layout = connect(alone, ParallelSizes(), announce=False)
        model = replace(model, hidden_dropout=0.0, attention_dropout=0.0)
        architecture = Architecture(model, ParallelConfig(), Precision.fp32, vocab_size, vocab_size)
        self.model, self.device = model, layout.device
        self.gpt = GPT(architecture, layout.tensor.group)
        adapt(self.gpt, model, finetune or FinetuneConfig())
        self.gpt = self.gpt.to(layout.device).eval()
        for name, parameter in self.gpt.named_parameters():
            parameter.copy_(weight(canonical_name(name, num_layers=model.num_layers)))

    @torch.no_grad()
    def logits(
        self, tokens: Tensor, images: Tensor | None = None, patch_ids: Tensor | None = None
    ) -> Tensor:
        """(B, S, vocab_size) fp32 for (B, S) token ids, and pictures as in Embedding."""
        gpt, projection = self.gpt, self.gpt.loss.projection
        given = (None if t is None else t.to(self.device) for t in (images, patch_ids))
        hidden = gpt.embedding(tokens.to(self.device), None, *given)
        for layer in gpt.layers:
            hidden = layer(hidden)
        logits = F.linear(gpt.head(hidden), gpt.output_weight) * projection.scale
        return (
            projection.softcap * torch.tanh(logits / projection.softcap)
            if projection.softcap
            else logits
        )
