"""Sizes that follow from the architecture."""

from __future__ import annotations

from pipeline.config.choices import Activation
from pipeline.config.model import ModelConfig


def head_width(model: ModelConfig) -> int:
    """Width of one attention head."""
    return model.head_dim or model.hidden_size // model.num_attention_heads


def ffn_width(model: ModelConfig) -> int:
    """Width of the MLP (of one expert in a mixture)."""
    width = model.ffn_hidden_size or 4 * model.hidden_size
    return (model.moe.ffn_hidden_size or width) if model.moe.num_experts else width


def is_gated(model: ModelConfig) -> bool:
    """Whether the MLP multiplies two projections."""
    return model.activation is Activation.swiglu
