"""Sizes that follow from the architecture, and the rules inside it."""

from __future__ import annotations

from pipeline.config import Activation, ModelConfig, NormPlacement, Position, RopeScaling
from pipeline.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def check_model(model: ModelConfig, *, tensor_parallel_size: int) -> None:
    """Raise ConfigError where the architecture contradicts itself or the tensor-parallel size."""
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    tensor = tensor_parallel_size
    for name in ("num_layers", "hidden_size", "num_attention_heads", "max_seq_len"):
        require(getattr(model, name) >= 1, f"model.{name} ({getattr(model, name)}) must be at least 1.")
    require(
        model.head_dim is not None or model.hidden_size % heads == 0,
        f"model.hidden_size ({model.hidden_size}) must be a multiple of model.num_attention_heads ({heads}), or set "
        f"model.head_dim. Nearest width: {round(model.hidden_size / heads) * heads}.",
    )
    require(
        heads % groups == 0,
        f"model.num_attention_heads ({heads}) must be a multiple of model.num_query_groups ({groups}).",
    )
    for name, value in (
        ("num_attention_heads", heads),
        ("num_query_groups", groups),
        ("ffn_hidden_size", ffn_width(model)),
    ):
        legal = [t for t in range(1, tensor) if heads % t == 0 and groups % t == 0 and ffn_width(model) % t == 0]
        require(
            value % tensor == 0,
            f"model.{name} ({value}) must be divisible by parallel.tensor_parallel_size ({tensor}). "
            f"Largest size that fits this model: {max(legal, default=1)}.",
        )
    rope = model.position is Position.rope
    require(not rope or head_width(model) % 2 == 0, f"rotary positions need an even head_dim, not {head_width(model)}.")
    require(
        rope or model.rope_scaling is RopeScaling.none,
        f"model.rope_scaling={model.rope_scaling.name} has no effect with model.position={model.position.name}. "
        "Set model.position=rope or model.rope_scaling=none.",
    )
    require(
        not (model.parallel_residual and model.norm_placement is NormPlacement.post),
        "model.parallel_residual=true needs model.norm_placement=pre: a parallel block has one sum to normalise "
        "before.",
    )
    moe = model.moe
    if moe.num_experts:
        require(
            1 <= moe.top_k <= moe.num_experts,
            f"model.moe.top_k ({moe.top_k}) must be between 1 and model.moe.num_experts ({moe.num_experts}).",
        )
        require(
            not model.bias,
            "mixture-of-experts layers have no biases: set model.bias=false (model.qkv_bias=true keeps the "
            "attention's).",
        )


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
