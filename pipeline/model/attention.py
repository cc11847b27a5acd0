"""Self-attention: megatron-core's projections around torch's scaled_dot_product_attention.

B micro-batch, S sequence, G key/value heads here, Q query heads per group, D head width.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention as McoreSelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.model import cpu_attention
from pipeline.model.recompute import recompute
from pipeline.model.rope import apply_rope

# In which order torch tries its CUDA kernels. Its own order has changed between releases; plain
# attention, which holds all S x S scores, comes last, for what no other kernel takes.
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


def document_mask(document_ids: Tensor) -> Tensor:
    """(B, 1, S, S) bool: a query sees keys of its own document that are not later."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    size = document_ids.shape[1]
    return same & torch.ones(size, size, dtype=torch.bool, device=document_ids.device).tril()


def one_key_head_per_query_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and v (B, G * Q, S, D): every head as often as query heads share it.

    Of CUDA's kernels only EFFICIENT_ATTENTION takes fp32, and it takes no groups: plain attention
    would hold S x S scores.
    """
    shares = q.shape[1] // k.shape[1]
    if shares == 1:
        return k, v
    return k.repeat_interleave(shares, dim=1), v.repeat_interleave(shares, dim=1)


class CoreAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v, by torch or, where it is faster, by cpu_attention."""

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
        if q.is_cuda and q.dtype is torch.float32:
            k, v = one_key_head_per_query_head(q, k, v)
        drops = self.dropout and self.training
        if mask is None and not drops and cpu_attention.is_faster(q):
            return cpu_attention.causal_attention(q, k, v, self.scale or q.shape[-1] ** -0.5)
        attend = partial(
            F.scaled_dot_product_attention,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        if drops:
            # Heads are split: every tensor-parallel rank its own stream.
            with get_cuda_rng_tracker().fork():
                return attend(q, k, v, dropout_p=self.dropout)
        return attend(q, k, v)


class Attention(McoreSelfAttention):
    """megatron-core's self-attention with a forward pass that copies nothing it need not copy."""

    def __init__(self, *args: Any, recompute_core: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recompute_core = recompute_core

    def forward(
        self, hidden: Tensor, mask: Tensor | None, rope: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Attention output, laid out as `hidden`.

        rope: cos and sin, (S, 1, 1, 1, D) or (1, S, 1, 1, D).
        """
        groups = self.num_query_groups_per_partition
        queries, width = (
            self.num_attention_heads_per_partition // groups,
            self.hidden_size_per_attention_head,
        )
        sequence_first = self.config.sequence_parallel
        qkv = self.linear_qkv(hidden)[0]
        # Megatron's rows: for each group its query heads, then its key, then its value, so that
        # tensor parallelism cuts between groups.
        qkv = qkv.view(*qkv.shape[:2], groups, queries + 2, width)
        # Splits, not slices: their backward pass is one concatenation instead of zeros and sums.
        if queries == 1 and (rope is None or self.q_layernorm is not None):
            q, k, v = qkv.unbind(3)
        elif self.q_layernorm is None and rope is not None:
            # Queries and keys turn alike: rotate them in one go.
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
        core = (
            partial(recompute, self.core_attention) if self.recompute_core else self.core_attention
        )
        context = core(q, k, v, mask).permute((2, 0, 1, 3) if sequence_first else (0, 2, 1, 3))
        return self.linear_proj(context.reshape(*context.shape[:2], -1))[0]
