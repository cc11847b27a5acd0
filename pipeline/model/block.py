"""Transformer blocks: megatron-core's attention and MLP in our own residual flow.

    tokens (B, S) -> Embedding -> hidden -> Block x num_layers -> Head -> hidden

hidden is (S / tensor_parallel_size, B, H) under sequence parallelism, as megatron-core's
collectives want it, and (B, S, H) otherwise, which spares every block its transposes. Under context
parallelism S is the rank's run of the sequences, in all but attention.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP as McoreMLP
from megatron.core.transformer.mlp import MLPSubmodules
from torch import Tensor, nn

from pipeline.config.choices import NormPlacement, Position, Recompute
from pipeline.model.activations import activate
from pipeline.model.architecture import Architecture
from pipeline.model.attention import Attention, CoreAttention
from pipeline.model.experts import build_experts
from pipeline.model.recompute import recompute
from pipeline.model.tensor_parallel import ColumnLinear, Norm, RowLinear, dropout


class MLP(McoreMLP):
    """megatron-core's MLP; its linears here add their own biases."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """MLP output in the layout of `hidden`."""
        wide = self.linear_fc1(hidden)[0]
        is_gated = self.config.gated_linear_unit
        return self.linear_fc2(activate(wide, self.activation_func, is_gated=is_gated))[0]


class Block(nn.Module):
    """One transformer block: attention and MLP with their norms and residual sums."""

    def __init__(self, architecture: Architecture, *, layer: int) -> None:
        super().__init__()
        model, again = architecture.model, architecture.recompute
        self.config = config = architecture.transformer
        self.is_post_norm = model.norm_placement is NormPlacement.post
        self.is_parallel = model.parallel_residual
        self.recompute = again is Recompute.full and layer % architecture.recompute_every == 0
        self.uses_rope = model.position is Position.rope
        if self.uses_rope:
            self.rope = architecture.rope
        groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        norm = Norm if config.qk_layernorm else None
        self.input_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attention = Attention(
            config,
            SelfAttentionSubmodules(ColumnLinear, CoreAttention, RowLinear, norm, norm),
            layer_number=layer + 1,
            attn_mask_type=AttnMaskType.causal if architecture.is_causal else AttnMaskType.no_mask,
            pg_collection=groups,
            recompute_core=again is Recompute.selective,
        )
        self.pre_mlp_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)
        self.is_moe = bool(model.moe.num_experts)
        if self.is_moe:
            self.mlp = build_experts(config, layer=layer)
        else:
            self.mlp = MLP(
                config,
                MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear),
                ffn_hidden_size=config.ffn_hidden_size,
                tp_group=groups.tp,
            )
        if model.compile:
            # Not the whole block: what recomputes is not traced, and all behind it was eager.
            self._run = torch.compile(self._run)  # type: ignore[method-assign]

    def forward(self, hidden: Tensor, starts: Tensor | None = None) -> Tensor:
        """Hidden after the block, in the same layout; starts as in CoreAttention."""
        if self.recompute and self.training:
            return recompute(self._run, hidden, starts)
        return self._run(hidden, starts)

    def _run(self, hidden: Tensor, starts: Tensor | None) -> Tensor:
        """The block's arithmetic, which full recomputation runs a second time."""
        rope = None
        if self.uses_rope:
            sequence = (
                hidden.shape[0] * self.config.tensor_model_parallel_size
                if self.config.sequence_parallel
                else hidden.shape[1]
            ) * self.config.context_parallel_size
            rope = self.rope.tables(sequence, hidden, sequence_first=self.config.sequence_parallel)
        if self.is_post_norm:  # GPT-1: the norms stand behind the sums, under the same names
            hidden = self.input_layernorm(
                hidden + self._dropout(self.self_attention(hidden, starts, rope))
            )
            return self.pre_mlp_layernorm(hidden + self._dropout(self._mlp(hidden)))
        attended = self._dropout(self.self_attention(self.input_layernorm(hidden), starts, rope))
        if self.is_parallel:
            return hidden + attended + self._dropout(self._mlp(self.pre_mlp_layernorm(hidden)))
        hidden = hidden + attended
        return hidden + self._dropout(self._mlp(self.pre_mlp_layernorm(hidden)))

    def _mlp(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden)[0] if self.is_moe else self.mlp(hidden)

    def _dropout(self, x: Tensor) -> Tensor:
        return dropout(x, self.config, self.training)
