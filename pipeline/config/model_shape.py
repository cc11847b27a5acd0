"""Sizes that follow from the architecture: every null of ModelConfig is filled here alone.

ModelConfig --resolve--> ModelShape
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.choices import Activation
from pipeline.config.model import ModelConfig


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a block, without nulls."""

    num_query_groups: int
    """Key/value heads."""
    head_dim: int
    """Width of one head."""
    ffn_hidden_size: int
    """Width of the MLP; of one expert in a mixture."""
    qkv_bias: bool
    """Whether the query/key/value projection has a bias."""
    is_gated: bool
    """Whether the MLP multiplies two projections."""

    @property
    def num_mlp_matrices(self) -> int:
        """Matrices of an MLP, each ffn_hidden_size * hidden_size."""
        return 3 if self.is_gated else 2


def resolve(model: ModelConfig) -> ModelShape:
    """The sizes that are set, and what the nulls stand for."""
    groups, head_dim, width = model.num_query_groups, model.head_dim, model.ffn_hidden_size
    if width is None:
        width = 4 * model.hidden_size
    if model.moe.num_experts and model.moe.ffn_hidden_size is not None:
        width = model.moe.ffn_hidden_size
    return ModelShape(
        num_query_groups=model.num_attention_heads if groups is None else groups,
        head_dim=model.hidden_size // model.num_attention_heads if head_dim is None else head_dim,
        ffn_hidden_size=width,
        qkv_bias=model.bias if model.qkv_bias is None else model.qkv_bias,
        is_gated=model.activation is Activation.swiglu,
    )
