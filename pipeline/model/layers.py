"""Transformer blocks: megatron-core's attention and MLP with our own attention core and residual flow.

    tokens (B, S) -> Embedding -> hidden -> Block x num_layers -> Head -> hidden

hidden is (S / tensor_parallel_size, B, H) under sequence parallelism, as megatron-core's collectives want it, and
(B, S, H) otherwise, which spares every block its transposes.

B micro-batch, S sequence, H hidden, G key/value heads here, Q query heads per group, D head width.
"""

from __future__ import annotations

import contextlib
import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention as McoreSelfAttention
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLP as McoreMLP
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.config import (
    Activation,
    Init,
    ModelConfig,
    Normalization,
    NormPlacement,
    ParallelConfig,
    Position,
    Recompute,
    TrainingConfig,
)
from pipeline.model import cpu_attention
from pipeline.model.parallel import (
    ColumnLinear,
    Norm,
    RowLinear,
    VocabEmbedding,
    checkpoint,
    dropout,
    linear_classes,
)
from pipeline.model.rope import apply_rope, rope_table
from pipeline.model_shape import ffn_width, head_width, is_gated


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al. 2021, arXiv:2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS = {
    Activation.gelu: F.gelu,
    Activation.gelu_tanh: partial(F.gelu, approximate="tanh"),
    Activation.swiglu: F.silu,
    Activation.squared_relu: squared_relu,
}


def transformer_config(model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """megatron-core's configuration of one block. Its own initialisation is off: model/init.py fills the weights."""
    on_cpu = not torch.cuda.is_available()
    moe: dict[str, Any] = {}
    if model.moe.num_experts:
        moe = {
            "num_moe_experts": model.moe.num_experts,
            "moe_router_topk": model.moe.top_k,
            # The softmax over one chosen expert is always 1: nothing would teach the router (arXiv:2101.03961).
            "moe_router_pre_softmax": model.moe.top_k == 1,
            "moe_ffn_hidden_size": ffn_width(model),
            "moe_shared_expert_intermediate_size": model.moe.shared_expert_ffn_hidden_size or None,
            "moe_router_load_balancing_type": "aux_loss" if model.moe.aux_loss_coeff else "none",
            "moe_aux_loss_coeff": model.moe.aux_loss_coeff,
            "moe_z_loss_coeff": model.moe.z_loss_coeff or None,
            "moe_token_dispatcher_type": "allgather" if on_cpu else "alltoall",
            "moe_router_dtype": "fp32",
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about Transformer Engine and fusions that we do not use
        return TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups or model.num_attention_heads,
            kv_channels=head_width(model),
            ffn_hidden_size=ffn_width(model),
            activation_func=ACTIVATIONS[model.activation],
            gated_linear_unit=is_gated(model),
            add_bias_linear=model.bias,
            add_qkv_bias=model.bias if model.qkv_bias is None else model.qkv_bias,
            normalization="RMSNorm" if model.normalization is Normalization.rmsnorm else "LayerNorm",
            layernorm_epsilon=model.norm_eps,
            qk_layernorm=model.qk_norm,
            hidden_dropout=model.hidden_dropout,
            attention_dropout=model.attention_dropout,
            softmax_scale=1.0 / head_width(model) if model.init is Init.mup else None,
            tensor_model_parallel_size=parallel.tensor_parallel_size,
            sequence_parallel=parallel.sequence_parallel,
            use_cpu_initialization=on_cpu,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            apply_rope_fusion=False,
            **moe,
        )


# In which order torch tries its CUDA kernels. Its own order has changed between releases; plain attention, which holds
# all S x S scores, comes last, for what no other kernel takes.
ATTENTION_KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,  # document masks
    SDPBackend.EFFICIENT_ATTENTION,  # fp32
    SDPBackend.MATH,
]


_pinned = contextlib.ExitStack()


def pin_attention_kernels() -> None:
    """Fix the order of attention kernels for the life of this process."""
    _pinned.close()
    _pinned.enter_context(sdpa_kernel(ATTENTION_KERNELS, set_priority=True))


class CoreAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v by torch's scaled_dot_product_attention or, where it is faster, cpu_attention'."""

    def __init__(self, config: TransformerConfig, *_: Any, **__: Any) -> None:
        super().__init__()
        self.dropout = config.attention_dropout
        self.scale = config.softmax_scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, G * Q, S, D).

        Args:
            q: (B, G * Q, S, D). k, v: (B, G, S, D).
            mask: (B, 1, S, S) bool, true where a query may look; None is causal.
        """
        drops = self.dropout and self.training
        if mask is None and not drops and cpu_attention.is_faster(q):
            return cpu_attention.causal_attention(q, k, v, self.scale or q.shape[-1] ** -0.5)
        attend = partial(
            F.scaled_dot_product_attention, attn_mask=mask, is_causal=mask is None, scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        if drops:
            with get_cuda_rng_tracker().fork():  # heads are split: every tensor-parallel rank its own stream
                return attend(q, k, v, dropout_p=self.dropout)
        return attend(q, k, v)


class Attention(McoreSelfAttention):
    """megatron-core's self-attention with a forward pass that copies nothing it need not copy."""

    def __init__(self, *args: Any, recompute_core: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recompute_core = recompute_core

    def forward(self, hidden: Tensor, mask: Tensor | None, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attention output in the layout of `hidden`; rope: cos and sin, (S, 1, 1, 1, D) or (1, S, 1, 1, D)."""
        groups = self.num_query_groups_per_partition
        queries, width = self.num_attention_heads_per_partition // groups, self.hidden_size_per_attention_head
        sequence_first = self.config.sequence_parallel
        qkv = self.linear_qkv(hidden)[0]
        qkv = qkv.view(*qkv.shape[:2], groups, queries + 2, width)
        # Splits, not slices: their backward pass is one concatenation instead of zeros and sums.
        if queries == 1 and (rope is None or self.q_layernorm is not None):
            q, k, v = qkv.unbind(3)
        elif self.q_layernorm is None and rope is not None:  # queries and keys turn alike: rotate them in one go
            qk, v = qkv.split((queries + 1, 1), dim=3)
            q, k = apply_rope(qk, *rope).split((queries, 1), dim=3)
            q, k, v = q.flatten(2, 3), k.squeeze(3), v.squeeze(3)
        else:
            q, k, v = qkv.split((queries, 1, 1), dim=3)
            q, k, v = q.flatten(2, 3), k.squeeze(3), v.squeeze(3)
        if self.q_layernorm is not None:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
            if rope is not None:
                cos, sin = (table.squeeze(-2) for table in rope)
                q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        to_heads = (1, 2, 0, 3) if sequence_first else (0, 2, 1, 3)  # -> (B, heads, S, D)
        q, k, v = q.permute(to_heads), k.permute(to_heads), v.permute(to_heads)
        core = partial(checkpoint, self.core_attention) if self.recompute_core else self.core_attention
        context = core(q, k, v, mask).permute((2, 0, 1, 3) if sequence_first else (0, 2, 1, 3))
        return self.linear_proj(context.reshape(*context.shape[:2], -1))[0]


class MLP(McoreMLP):
    """megatron-core's MLP; its linears here add their own biases."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """MLP output in the layout of `hidden`."""
        wide = self.linear_fc1(hidden)[0]
        if self.config.gated_linear_unit:
            gate, up = wide.chunk(2, dim=-1)
            return self.linear_fc2(self.activation_func(gate) * up)[0]
        return self.linear_fc2(self.activation_func(wide))[0]


class Block(nn.Module):
    """One transformer block: attention and MLP with their norms and residual sums."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, training: TrainingConfig, *, layer: int) -> None:
        super().__init__()
        self.config = config
        self.is_post_norm = model.norm_placement is NormPlacement.post
        self.is_parallel = model.parallel_residual
        self.recompute = training.recompute is Recompute.full and layer % training.recompute_every == 0
        self.uses_rope = model.position is Position.rope
        if self.uses_rope:
            self.rope = rope_table(model)
        column, row = linear_classes(model.backend)
        groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        norm = Norm if config.qk_layernorm else None
        self.input_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attention = Attention(
            config,
            SelfAttentionSubmodules(column, CoreAttention, row, norm, norm),
            layer_number=layer + 1,
            pg_collection=groups,
            recompute_core=training.recompute is Recompute.selective,
        )
        self.pre_mlp_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)
        self.is_moe = bool(model.moe.num_experts)
        self.mlp = self._experts(config, layer) if self.is_moe else MLP(
            config, MLPSubmodules(linear_fc1=column, linear_fc2=row),
            ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.tp,
        )  # fmt: skip

    @staticmethod
    def _experts(config: TransformerConfig, layer: int) -> nn.Module:
        spec = get_mlp_module_spec(use_te=False, num_experts=config.num_moe_experts)
        linears = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)
        spec.submodules.experts.submodules = spec.submodules.shared_experts.submodules = linears
        moe = build_module(spec, config=config)
        moe.set_layer_number(layer + 1)
        return moe

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden after the block, in the same layout; mask as in CoreAttention."""
        if self.recompute and self.training:
            return checkpoint(self._run, hidden, mask)
        return self._run(hidden, mask)

    def _run(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        rope = None
        if self.uses_rope:
            sequence = (
                hidden.shape[0] * self.config.tensor_model_parallel_size
                if self.config.sequence_parallel
                else hidden.shape[1]
            )
            rope = self.rope.tables(sequence, hidden, sequence_first=self.config.sequence_parallel)
        if self.is_post_norm:
            hidden = self.input_layernorm(hidden + self._dropout(self.self_attention(hidden, mask, rope)))
            return self.pre_mlp_layernorm(hidden + self._dropout(self._mlp(hidden)))
        attended = self._dropout(self.self_attention(self.input_layernorm(hidden), mask, rope))
        if self.is_parallel:
            return hidden + attended + self._dropout(self._mlp(self.pre_mlp_layernorm(hidden)))
        hidden = hidden + attended
        return hidden + self._dropout(self._mlp(self.pre_mlp_layernorm(hidden)))

    def _mlp(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden)[0] if self.is_moe else self.mlp(hidden)

    def _dropout(self, x: Tensor) -> Tensor:
        return dropout(x, self.config, self.training)


class Embedding(nn.Module):
    """Word embedding, plus the position table where there is one."""

    def __init__(
        self, config: TransformerConfig, model: ModelConfig, *, padded_vocab_size: int, with_positions: bool
    ) -> None:
        super().__init__()
        self.config = config
        self.word = VocabEmbedding(padded_vocab_size, model.hidden_size, config=config)
        self.position = None
        if with_positions and model.position is Position.learned:
            self.position = nn.Embedding(model.max_seq_len, model.hidden_size)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Hidden of `tokens` (B, S), in the layout of the module docstring; positions: (B, S), None counts from 0."""
        hidden = self.word(tokens)
        if self.position is not None:
            rows = self.position.weight[: tokens.shape[1]] if positions is None else self.position(positions)
            hidden = hidden + rows
        if self.config.sequence_parallel:
            # The scatter's backward gathers, so the tables' gradients are whole on every rank.
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden.transpose(0, 1).contiguous())
        return dropout(hidden, self.config, self.training)


class Head(nn.Module):
    """Final norm and, unless it is tied to the embedding, the weight of the output projection."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, *, padded_vocab_size: int) -> None:
        super().__init__()
        has_norm = model.norm_placement is NormPlacement.pre
        self.norm = Norm(config, config.hidden_size, config.layernorm_epsilon) if has_norm else nn.Identity()
        self.word = (
            None if model.tied_embeddings else VocabEmbedding(padded_vocab_size, model.hidden_size, config=config)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden, normalised."""
        return self.norm(hidden)


def set_moe_loss_scale(scale: Tensor) -> None:
    """0-dim weight of the router losses in the backward pass: they ride on activations past the engine's scaling."""
    MoEAuxLossAutoScaler.set_loss_scale(scale)
