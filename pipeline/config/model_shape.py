"""Sizes that follow from the architecture: every null of ModelConfig is filled here alone.

ModelConfig --resolve--> ModelShape
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.choices import Activation
from pipeline.config.model import ModelConfig, VisionConfig


@dataclass(frozen=True)
class VisionShape:
    """Sizes of the picture encoder, without nulls."""

    head_dim: int
    """Width of one head."""
    ffn_hidden_size: int
    """Width of an MLP."""
    num_patches: int
    """Of a picture: as many placeholder tokens stand for it."""
    patch_numbers: int
    """Red, green and blue of a patch's pixels."""


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
    vision: VisionShape | None = None
    """Of the picture encoder; None: there is none."""

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
        vision=_resolve_vision(model.vision) if model.vision.num_layers else None,
    )


def _resolve_vision(vision: VisionConfig) -> VisionShape:
    width = vision.ffn_hidden_size
    # Rules of the text model ask too, where another one says that these numbers are no divisors.
    heads, edge = max(1, vision.num_attention_heads), max(1, vision.patch_size)
    return VisionShape(
        head_dim=vision.hidden_size // heads,
        ffn_hidden_size=4 * vision.hidden_size if width is None else width,
        num_patches=(vision.image_size // edge) ** 2,
        patch_numbers=3 * vision.patch_size**2,
    )
