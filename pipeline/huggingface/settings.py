"""A Hugging Face folder's config.json in our settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config.choices import Activation, Normalization, Position, RopeScaling
from pipeline.config.model import ModelConfig, MoeConfig
from pipeline.errors import CheckpointError
from pipeline.huggingface.decoder import LLAMA3
from pipeline.huggingface.gpt2 import ACTIVATIONS


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture of a Hugging Face folder in our settings.

    Raises:
        CheckpointError: no config.json, or a model of another kind.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}.") from None
    kind = config.get("model_type")
    name = folder.resolve().name
    if kind == "gpt2":
        return _from_gpt2(config, name, folder)
    if kind in ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"):
        return _from_llama(config, name, folder)
    raise CheckpointError(
        f"{folder} holds a model of type '{kind}'. Weights can be taken from gpt2, llama, qwen2, "
        "qwen3, mixtral and qwen3_moe."
    )


def _from_gpt2(config: dict[str, Any], name: str, folder: Path) -> ModelConfig:
    spellings = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {
        "gelu_pytorch_tanh": Activation.gelu_tanh
    }
    activation = spellings.get(config.get("activation_function", "gelu_new"))
    unlike = [
        key for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention") if config.get(key)
    ]
    if activation is None or unlike or config.get("scale_attn_weights", True) is not True:
        raise CheckpointError(
            f"{folder} is a GPT-2 variant that this program does not compute "
            f"({unlike or 'activation'})."
        )
    return ModelConfig(
        name=name,
        num_layers=config["n_layer"],
        hidden_size=config["n_embd"],
        num_attention_heads=config["n_head"],
        ffn_hidden_size=config.get("n_inner") or 4 * config["n_embd"],
        vocab_size=config["vocab_size"],
        max_seq_len=config.get("n_positions", 1024),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=activation,
        tied_embeddings=config.get("tie_word_embeddings", True),
    )


def _from_llama(config: dict[str, Any], name: str, folder: Path) -> ModelConfig:
    kind = config["model_type"]
    # transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling.
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling not in ("default", "linear", "llama3") or any(
        rope.get(k, v) != v for k, v in LLAMA3.items()
    ):
        raise CheckpointError(
            f"{folder} stretches its rotary positions in a way that this program does not compute: "
            f"{rope}."
        )
    if config.get("hidden_act", "silu") != "silu" or (
        config.get("use_sliding_window", kind == "mixtral") and config.get("sliding_window")
    ):
        raise CheckpointError(
            f"{folder} has another activation than silu, or a sliding window; this program "
            "computes neither."
        )
    if kind == "mixtral" and config["num_experts_per_tok"] == 1:
        raise CheckpointError(
            f"{folder} gives a single chosen expert the weight 1; this program does not."
        )
    if kind == "qwen3_moe":
        renormalises, several = (
            config.get("norm_topk_prob", False),
            config["num_experts_per_tok"] > 1,
        )
        if (
            renormalises != several
            or config.get("decoder_sparse_step", 1) != 1
            or config.get("mlp_only_layers")
        ):
            raise CheckpointError(
                f"{folder} has layers without experts, or norm_topk_prob={renormalises} with "
                f"num_experts_per_tok={config['num_experts_per_tok']}; this program computes "
                "neither."
            )
    bias = bool(config.get("mlp_bias", False))
    attention_bias = bool(config.get("attention_bias", kind == "qwen2"))
    if bias and not attention_bias:
        raise CheckpointError(
            f"{folder} has biases in its MLP but not in its attention; this program computes "
            "neither or both."
        )
    return ModelConfig(
        name=name,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_seq_len=config.get("max_position_embeddings", 2048),
        position=Position.rope,
        rope_theta=rope.get("rope_theta", 10000.0),
        rope_scaling=RopeScaling.none if scaling == "default" else RopeScaling[scaling],
        rope_scaling_factor=rope.get("factor", 1.0),
        rope_original_max_seq_len=rope.get("original_max_position_embeddings", 8192),
        normalization=Normalization.rmsnorm,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=Activation.swiglu,
        bias=bias,
        qkv_bias=attention_bias,
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        tied_embeddings=config.get("tie_word_embeddings", False),
        moe=_experts(config),
    )


def _experts(config: dict[str, Any]) -> MoeConfig:
    kind = config["model_type"]
    if kind == "mixtral":
        return MoeConfig(
            num_experts=config["num_local_experts"], top_k=config["num_experts_per_tok"]
        )
    if kind == "qwen3_moe":
        width = config["moe_intermediate_size"]
        return MoeConfig(
            num_experts=config["num_experts"],
            top_k=config["num_experts_per_tok"],
            ffn_hidden_size=width,
        )
    return MoeConfig()
