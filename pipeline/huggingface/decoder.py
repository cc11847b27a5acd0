"""LlamaForCausalLM and Qwen3ForCausalLM: rotary positions, RMSNorm, SwiGLU.

Mixtures (mixtures.py) share their settings and the rules of everything but the MLP.
"""

from __future__ import annotations

from typing import Any

from pipeline.config.choices import RopeScaling
from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import resolve
from pipeline.huggingface.rules import (
    Mapping,
    Rule,
    concatenate,
    has_bias,
    head_rules,
    split_and_join_qkv,
    tie,
)

# What transformers calls llama3 scaling's constants; ours are in model/rope.py.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def llama(model: ModelConfig) -> Mapping:
    """LlamaForCausalLM, or Qwen3ForCausalLM where queries and keys are normalised."""
    sizes = resolve(model)
    config = {
        "model_type": "qwen3" if model.qk_norm else "llama",
        **decoder_config(model),
        "intermediate_size": sizes.ffn_hidden_size,
        "attention_bias": model.bias or sizes.qkv_bias,
    }
    if not model.qk_norm:
        config["mlp_bias"] = model.bias
    rules = decoder_rules(model)
    zeros: dict[str, tuple[int, ...]] = {}
    for i in range(model.num_layers):
        at, there = f"layers.{i}.mlp", f"model.layers.{i}.mlp"
        for kind in ["weight", "bias"] if model.bias else ["weight"]:
            gated = (f"{there}.gate_proj.{kind}", f"{there}.up_proj.{kind}")
            rules.append(
                Rule(f"{at}.linear_fc1.{kind}", gated, lambda w: list(w.chunk(2)), concatenate)
            )
            rules.append(Rule(f"{at}.linear_fc2.{kind}", (f"{there}.down_proj.{kind}",)))
        if sizes.qkv_bias and not model.bias:  # their switch covers the output projection too
            zeros[f"model.layers.{i}.self_attn.o_proj.bias"] = (model.hidden_size,)
        elif model.bias and not sizes.qkv_bias:
            width, groups = sizes.head_dim, sizes.num_query_groups
            for kind, heads in (("q", model.num_attention_heads), ("k", groups), ("v", groups)):
                zeros[f"model.layers.{i}.self_attn.{kind}_proj.bias"] = (heads * width,)
    architecture = "Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"
    return Mapping(architecture, config | tie(model), rules + head_rules(model), zeros)


def decoder_config(model: ModelConfig) -> dict[str, Any]:
    """Settings that the Llama family shares."""
    scaling: dict[str, Any] | None = None
    if model.rope_scaling is not RopeScaling.none:
        scaling = {"rope_type": model.rope_scaling.name, "factor": model.rope_scaling_factor}
    if model.rope_scaling is RopeScaling.llama3:
        assert scaling is not None
        scaling |= {**LLAMA3, "original_max_position_embeddings": model.rope_original_max_seq_len}
    return {
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_seq_len,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": resolve(model).num_query_groups,
        "head_dim": resolve(model).head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_std,
    }


def decoder_rules(model: ModelConfig) -> list[Rule]:
    """Everything of the Llama family but the MLP and the head."""
    rules = [
        Rule("embedding.word.weight", ("model.embed_tokens.weight",)),
        Rule("final_norm.weight", ("model.norm.weight",)),
    ]
    for i in range(model.num_layers):
        at, there = f"layers.{i}", f"model.layers.{i}"
        rules.append(Rule(f"{at}.input_layernorm.weight", (f"{there}.input_layernorm.weight",)))
        rules.append(
            Rule(f"{at}.pre_mlp_layernorm.weight", (f"{there}.post_attention_layernorm.weight",))
        )
        for kind in ("weight", "bias"):
            if kind == "weight" or has_bias(model, "self_attention.linear_qkv"):
                theirs = tuple(f"{there}.self_attn.{part}_proj.{kind}" for part in "qkv")
                rules.append(
                    Rule(
                        f"{at}.self_attention.linear_qkv.{kind}", theirs, *split_and_join_qkv(model)
                    )
                )
            if kind == "weight" or model.bias:
                rules.append(
                    Rule(
                        f"{at}.self_attention.linear_proj.{kind}",
                        (f"{there}.self_attn.o_proj.{kind}",),
                    )
                )
        if model.qk_norm:
            rules += [
                Rule(
                    f"{at}.self_attention.{part}_layernorm.weight",
                    (f"{there}.self_attn.{part}_norm.weight",),
                )
                for part in "qk"
            ]
    return rules
