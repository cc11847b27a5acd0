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
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.model import block_attention, documents
from pipeline.model.context_parallel import exchange, spread_groups
from pipeline.model.recompute import recompute
from pipeline.model.rope import apply_rope

_pinned = contextlib.ExitStack()


def kernel_order(capability: tuple[int, int]) -> list[SDPBackend]:
    """In which order torch tries its CUDA kernels on a device of this compute capability.

    cuDNN's first where it has kernels of its own for the chip: on an H200 1.3 to 1.8 times the
    flash kernel's rate (benchmarks/gpu_attention.py). Plain attention, which holds all S x S
    scores, comes last, for what no other kernel takes.
    """
    fast = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    if capability in ((9, 0), (10, 0)):
        fast.reverse()
    return [*fast, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # EFFICIENT takes fp32


def pin_attention_kernels() -> None:
    """Fix the order of attention kernels for the life of this process: torch's own has changed."""
    _pinned.close()
    capability = (0, 0)
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        # At the first attention on a device torch sets its own order, over any that was set before.
        one = torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16, device="cuda")
        F.scaled_dot_product_attention(one, one, one)
    _pinned.enter_context(sdpa_kernel(kernel_order(capability), set_priority=True))


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
    """softmax(q k^T / sqrt(D)) v, by torch or, where it is faster, by block_attention."""

    def __init__(
        self,
        config: TransformerConfig,
        *_: Any,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        **__: Any,
    ) -> None:
        super().__init__()
        self.is_causal = attn_mask_type is AttnMaskType.causal
        self.dropout = config.attention_dropout
        self.scale = config.softmax_scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> Tensor:
        """(B, G * Q, S, D).

        Args:
            q: (B, G * Q, S, D). k, v: (B, G, S, D).
            starts: (B, S) int64, the first key each query sees; None: all that are not later, or
                simply all where it was so built.
        """
        dropout = self.dropout if self.training else 0.0
        # Heads are split: every tensor-parallel rank its own stream.
        stream = get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext()
        scale = self.scale_of(q)
        with stream:
            if starts is not None:
                return documents.attend(q, k, v, starts, scale=scale, dropout=dropout)
            if self.is_causal and not dropout and block_attention.is_faster(q):
                return block_attention.causal_attention(q, k, v, scale)
            if q.is_cuda and q.dtype is torch.float32:
                k, v = one_key_head_per_query_head(q, k, v)
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=self.is_causal, dropout_p=dropout, scale=self.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip

    def scale_of(self, q: Tensor) -> float:
        """What q k^T is multiplied with: 1 / sqrt(D), under muP 1 / D."""
        return float(self.scale or q.shape[-1] ** -0.5)


class Attention(McoreSelfAttention):
    """megatron-core's self-attention with a forward pass that copies nothing it need not copy."""

    def __init__(self, *args: Any, recompute_core: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recompute_core = recompute_core
        self.context_group = self.pg_collection.cp

    def forward(
        self, hidden: Tensor, starts: Tensor | None, rope: tuple[Tensor, Tensor] | None
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
        along, shared = 0 if sequence_first else 1, self.config.context_parallel_size > 1
        qkv = self.linear_qkv(hidden)[0]
        # Megatron's rows: for each group its query heads, then its key, then its value, so that
        # tensor parallelism cuts between groups.
        qkv = qkv.view(*qkv.shape[:2], groups, queries + 2, width)
        if shared:  # whole sequences of this rank's groups, before what depends on positions
            qkv = spread_groups(qkv, self.context_group.size())
            queries = qkv.shape[3] - 2
            qkv = exchange(qkv, self.context_group, gather=along, split=2)
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
        context = core(q, k, v, starts).permute((2, 0, 1, 3) if sequence_first else (0, 2, 1, 3))
        if shared:  # all heads of this rank's run of the sequences
            context = exchange(context, self.context_group, gather=2, split=along)
        return self.linear_proj(context.reshape(*context.shape[:2], -1))[0]
