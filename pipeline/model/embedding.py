"""The ends of the model: tables, picture encoder, final norm and output weight."""

from __future__ import annotations

from megatron.core import tensor_parallel
from torch import Tensor, nn

from pipeline.config.choices import NormPlacement, Position
from pipeline.model.architecture import Architecture
from pipeline.model.context_parallel import context_group
from pipeline.model.tensor_parallel import Norm, VocabEmbedding, dropout
from pipeline.model.vision import Vision, put_into


class Embedding(nn.Module):
    """Word embedding, plus the position table and the picture encoder where there are any."""

    def __init__(self, architecture: Architecture, *, is_first: bool = True) -> None:
        """As the first layer, or the copy of a tied word embedding beside the loss."""
        super().__init__()
        model, self.config = architecture.model, architecture.transformer
        self.word = VocabEmbedding(
            architecture.padded_vocab_size, model.hidden_size, config=self.config
        )
        self.context_rank = context_group().rank()
        self.position = None
        if is_first and model.position is Position.learned:
            self.position = nn.Embedding(model.max_seq_len, model.hidden_size)
        self.vision = Vision(architecture) if is_first and model.vision.num_layers else None

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        images: Tensor | None = None,
        patch_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden of `tokens` (B, S), laid out as the module says.

        Args:
            positions: (B, S), None counts from where this rank's run of the sequences begins.
            images: (B, pictures, 3, size, size) uint8; None: there are none.
            patch_ids: (B, S), as in `put_into`.
        """
        hidden = self.word(tokens)
        if images is not None:
            assert self.vision is not None and patch_ids is not None
            hidden = put_into(hidden, self.vision(images), patch_ids)
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
