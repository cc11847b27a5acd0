"""The canonical names of a model's parameters, without building it; see pipeline/model/names.py."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.choices import Normalization, NormPlacement, Position
from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import resolve


def parameter_names(model: ModelConfig) -> Iterator[str]:
    """The canonical name of every parameter of a model, which need not be built."""
    norm = ["weight", "bias"] if model.normalization is Normalization.layernorm else ["weight"]
    linear = ["weight", "bias"] if model.bias else ["weight"]
    yield "embedding.word.weight"
    if model.position is Position.learned:
        yield "embedding.position.weight"
    for layer in range(model.num_layers):
        at = f"layers.{layer}"
        yield from (f"{at}.{n}.{k}" for n in ("input_layernorm", "pre_mlp_layernorm") for k in norm)
        yield f"{at}.self_attention.linear_qkv.weight"
        if resolve(model).qkv_bias:
            yield f"{at}.self_attention.linear_qkv.bias"
        yield from (f"{at}.self_attention.linear_proj.{kind}" for kind in linear)
        if model.qk_norm:
            yield from (f"{at}.self_attention.{n}_layernorm.{kind}" for n in "qk" for kind in norm)
        if model.moe.num_experts:
            yield f"{at}.mlp.router.weight"
        for mlp in _mlps(model):
            yield from (f"{at}.{mlp}.linear_fc{n}.{kind}" for n in (1, 2) for kind in linear)
    if model.norm_placement is NormPlacement.pre:
        yield from (f"final_norm.{kind}" for kind in norm)
    if not model.tied_embeddings:
        yield "head.weight"


def _mlps(model: ModelConfig) -> list[str]:
    """The MLPs of a block: one, or the experts."""
    if not model.moe.num_experts:
        return ["mlp"]
    shared = ["mlp.shared_experts"] if model.moe.shared_expert_ffn_hidden_size else []
    return [f"mlp.experts.local_experts.{e}" for e in range(model.moe.num_experts)] + shared
