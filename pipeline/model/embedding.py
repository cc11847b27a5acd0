"""The ends of the model: token and position tables, final norm and output weight."""

from __future__ import annotations

from megatron.core import tensor_parallel
from torch import Tensor, nn

from pipeline.config.choices import NormPlacement, Position
from pipeline.model.architecture import Architecture
from pipeline.model.context_parallel import context_group
from pipeline.model.tensor_parallel import Norm, VocabEmbedding, dropout


class Embedding(nn.Module):
    """Word embedding, plus the position table where there is one."""

    def __init__(self, architecture: Architecture, *, with_positions: bool = True) -> None:
        super().__init__()
        model, self.config = architecture.model, architecture.transformer
        self.word = VocabEmbedding(
            architecture.padded_vocab_size, model.hidden_size, config=self.config
        )
        self.context_rank = context_group().rank()
        self.position = None
        if with_positions and model.position is Position.learned:
            self.position = nn.Embedding(model.max_seq_len, model.hidden_size)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Hidden of `tokens` (B, S), laid out as the module says.

        positions: (B, S), None counts from where this rank's run of the sequences begins.
        """
        hidden = self.word(tokens)
        if self.position is not None:
            size = tokens.shape[1]
            begin = self.context_rank * size
            rows = (
                self.position.weight[begin : begin + size]
                if positions is None
                else self.position(positions)
            )
            hidden = hidden + rows
        if self.config.sequence_parallel:
            # The scatter's backward gathers, so the tables' gradients are whole on every rank. It
            # returns a view, which keeps the whole sequence alive until the backward pass: 0.65 GiB
            # of 19.1 on rank 0 of gpt3-175b at TP 8, PP 16. Hence a copy.
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(
                hidden.transpose(0, 1).contiguous()
            ).clone()
        return dropout(hidden, self.config, self.training)


class Head(nn.Module):
    """Final norm and, unless it is tied to the embedding, the weight of the output projection."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        model, config = architecture.model, architecture.transformer
        has_norm = model.norm_placement is NormPlacement.pre
        self.norm = (
            Norm(config, config.hidden_size, config.layernorm_epsilon)
            if has_norm
            else nn.Identity()
        )
        self.word = (
            None
            if model.tied_embeddings
            else VocabEmbedding(architecture.padded_vocab_size, model.hidden_size, config=config)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden, normalised."""
        return self.norm(hidden)
