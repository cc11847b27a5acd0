"""A Hugging Face folder's config.json in our settings: each key is used, meaningless, or refused.

config.json --what is missing, unlike or unknown?--> CheckpointError, or a ModelConfig
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pipeline.config import model_rules
from pipeline.config.choices import Activation, Normalization, Position, RopeScaling
from pipeline.config.model import ModelConfig, MoeConfig
from pipeline.errors import CheckpointError
from pipeline.huggingface.decoder import LLAMA3
from pipeline.huggingface.gpt2 import ACTIVATIONS
from pipeline.huggingface.json_files import read_json
from pipeline.huggingface.llava import text_of, tower_of
from pipeline.huggingface.other_families import OTHERS
from pipeline.shapes import misfits

_DECODER = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps"]
_LATER = [*_DECODER, "num_key_value_heads"]  # whose classes have other defaults than Llama's
# What a folder of each kind must say. Where transformers' default depends on its release or the
# class, we do not guess it.
REQUIRED = {
    "gpt2": ["n_embd", "n_layer", "n_head", "vocab_size"],
    "llama": [*_DECODER, "intermediate_size"],
    "mistral": [*_LATER, "intermediate_size", "sliding_window"],
    "qwen2": [*_LATER, "intermediate_size"],
    "qwen3": [*_LATER, "intermediate_size", "head_dim"],
    "mixtral": [*_LATER, "intermediate_size", "num_local_experts", "num_experts_per_tok"],
    "qwen3_moe": [
        *_LATER,
        "head_dim",
        "moe_intermediate_size",
        "num_local_experts",
        "num_experts_per_tok",
        "norm_topk_prob",
    ],
}
_ROPE = ["rope_theta", "rope_scaling", "rope_parameters"]
_WINDOW = ["sliding_window", "use_sliding_window", "max_window_layers", "layer_types"]
_USED_DECODER = [
    "head_dim",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
    *_ROPE,
    *_WINDOW,
]
# What is read besides.
USED = {
    "gpt2": [
        "n_inner",
        "n_positions",
        "layer_norm_epsilon",
        "activation_function",
        "tie_word_embeddings",
    ],
    "llama": [*_USED_DECODER, "attention_bias", "mlp_bias"],
    "mistral": _USED_DECODER,
    "qwen2": _USED_DECODER,
    "qwen3": [*_USED_DECODER, "attention_bias"],
    "mixtral": _USED_DECODER,
    "qwen3_moe": [*_USED_DECODER, "attention_bias"],
}
_SIZE, _FLAG, _NUMBER = (range(2**31), None), (bool, None), (float, None)
_SIZES = """n_embd n_layer n_head n_inner n_positions vocab_size hidden_size num_hidden_layers
    num_attention_heads num_key_value_heads intermediate_size head_dim num_local_experts num_experts
    num_experts_per_tok moe_intermediate_size max_position_embeddings sliding_window"""
_ROTARY = {
    "rope_theta?": _NUMBER,
    "factor?": _NUMBER,
    "rope_type?": (str, None),
    "type?": (str, None),
    "original_max_position_embeddings?": _SIZE,
}
# Of what is computed with; `?`: REQUIRED says which must be there.
SHAPE: dict[str, Any] = {
    **{f"{key}?": _SIZE for key in _SIZES.split()},
    **{f"{key}?": _NUMBER for key in ("rms_norm_eps", "layer_norm_epsilon", "rope_theta")},
    "norm_topk_prob?": _FLAG,
    "tie_word_embeddings?": _FLAG,
    "attention_bias?": _FLAG,
    "mlp_bias?": _FLAG,
    "use_sliding_window?": _FLAG,
    "activation_function?": str,
    "rope_scaling?": (_ROTARY, None),
    "rope_parameters?": (_ROTARY, None),
    "layer_types?": ([str], None),
}
# What only one value of is computed here.
FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "decoder_sparse_step": 1,
    "scale_attn_weights": True,
    "is_causal": True,
}
# Keys that say nothing about what is computed: training, generation, heads of other classes, and
# how transformers runs the model.
MEANINGLESS = set(
    """
    model_type architectures transformers_version torch_dtype dtype auto_map _name_or_path
    _attn_implementation attn_implementation _attn_implementation_autoset
    use_cache bos_token_id eos_token_id pad_token_id unk_token_id tokenizer_class
    initializer_range attention_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout
    router_aux_loss_coef router_jitter_noise output_router_logits output_attentions
    output_hidden_states return_dict gradient_checkpointing pretraining_tp
    reorder_and_upcast_attn n_ctx max_sequence_length task_specific_params id2label label2id
    problem_type summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj is_decoder unsloth_fixed unsloth_version chunk_size_feed_forward num_labels
    _num_labels predict_special_tokens is_llama_config transformers.js_config do_sample max_length
    temperature top_k top_p typical_p repetition_penalty length_penalty num_beams num_beam_groups
    num_return_sequences
    """.split()
)


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture of a Hugging Face folder in our settings.

    Raises:
        CheckpointError: no config.json, or a model that this program does not compute.
    """
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") == "llava":
        try:
            vision, inner = tower_of(config.get("vision_config")), text_of(config)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        model = replace(_text_model(folder, inner), vision=vision)
    else:
        model = _text_model(folder, config)
    if problem := next(model_rules.alone(model), None):
        raise CheckpointError(f"{path} describes no model: {problem}")
    return model


def _text_model(folder: Path, config: dict[str, Any]) -> ModelConfig:
    """The settings of a text model's config.json, or of a part of one."""
    path = folder / "config.json"
    kind = str(config.get("model_type"))
    if kind not in REQUIRED:
        missing = f" (it needs {OTHERS[kind]})" if kind in OTHERS else ""
        raise CheckpointError(
            f"{folder} holds a model of type '{kind}'{missing}. Weights can be taken from "
            f"{', '.join(REQUIRED)}."
        )
    if kind == "qwen3_moe" and "num_experts" in config:  # transformers before 5.8
        config = {"num_local_experts": config["num_experts"], **config}
        del config["num_experts"]
    if wrong := list(islice(misfits(config, SHAPE), 3)):
        raise CheckpointError(f"{path} is no config.json: {'; '.join(wrong)}.")
    config = _without_nulls(config)
    # The first one only: what lacks keys cannot be looked at further.
    if problem := next(chain(_missing(config), _unlike(config), _unknown(config)), None):
        raise CheckpointError(f"{path} {problem}")
    name = re.sub(r"[^\w.]+", "-", folder.resolve().name).strip("-") or kind
    return _from_gpt2(config, name) if kind == "gpt2" else _from_decoder(config, name)


def _without_nulls(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that say something; no window is one, as Mistral has one by default."""
    kept = {key: value for key, value in config.items() if value is not None}
    for key in ("rope_scaling", "rope_parameters"):
        if key in kept:
            kept[key] = {name: value for name, value in kept[key].items() if value is not None}
    if "sliding_window" in config:
        kept["sliding_window"] = config["sliding_window"]
    return kept


def _missing(config: dict[str, Any]) -> Iterator[str]:
    """A sentence on what the file must say and does not."""
    kind = config["model_type"]
    absent = [key for key in REQUIRED[kind] if key not in config]
    if kind not in ("gpt2", "llama") and "rope_theta" not in _rope(config):
        absent.append("rope_theta")
    if absent:
        yield f"lacks {', '.join(absent)}. A folder that transformers wrote has them."


def _unlike(config: dict[str, Any]) -> Iterator[str]:
    """A sentence on what it asks for that this program does not compute."""
    if config.get("quantization_config"):
        yield (
            "has a quantization_config: the weights are quantised. Take the folder they were made "
            "from, or write them as bf16 with transformers first."
        )
    found = (
        [*_unlike_gpt2(config)] if config["model_type"] == "gpt2" else [*_unlike_decoder(config)]
    )
    found += [
        f"{key}={config[key]!r}" for key, value in FIXED.items() if config.get(key, value) != value
    ]
    if found:
        yield f"asks for what this program does not compute: {'; '.join(found)}."


def _unlike_gpt2(config: dict[str, Any]) -> Iterator[str]:
    activation = config.get("activation_function", "gelu_new")
    if activation not in _activations():
        yield f"activation_function={activation!r}"


def _unlike_decoder(config: dict[str, Any]) -> Iterator[str]:
    """Settings of the Llama family, of its rotary positions, windows, biases and experts."""
    kind, rope = config["model_type"], _rope(config)
    scaling = rope["rope_type"]
    if scaling not in ("default", "linear", "llama3"):
        yield f"rope_type={scaling!r}"
    needs = {
        "linear": ["factor"],
        "llama3": ["factor", "original_max_position_embeddings", *LLAMA3],
    }
    for key in needs.get(scaling, []):
        if key not in rope or rope[key] != LLAMA3.get(key, rope[key]):
            yield f"rope_type={scaling!r} with {key}={rope.get(key)!r}"
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor", *sum(needs.values(), [])}
    yield from (
        f"rope's {key}={value!r}" for key, value in rope.items() if key not in known and value
    )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor={rope['partial_rotary_factor']!r}"
    window = config.get("sliding_window")
    # The switch is Qwen's: the other classes do not look at it.
    has_window = config.get("use_sliding_window", False) if kind.startswith("qwen") else True
    if has_window and window is not None:
        longest = config.get("max_position_embeddings", math.inf)
        if window < longest:
            yield f"sliding_window={window}, shorter than max_position_embeddings={longest}"
    if others := set(config.get("layer_types") or []) - {"full_attention"}:
        yield f"layer_types={', '.join(sorted(map(str, others)))}"
    if config.get("mlp_bias") and not config.get("attention_bias"):
        yield "biases in the MLP but not in attention (mlp_bias, attention_bias)"
    if kind == "mixtral" and config["num_experts_per_tok"] == 1:
        yield "num_experts_per_tok=1, whose expert Mixtral gives the weight 1"
    if kind == "qwen3_moe":
        renormalises, chosen = config["norm_topk_prob"], config["num_experts_per_tok"]
        if renormalises != (chosen > 1):
            yield f"norm_topk_prob={renormalises} with num_experts_per_tok={chosen}"
        if config.get("mlp_only_layers"):
            yield f"layers without experts (mlp_only_layers={config['mlp_only_layers']})"


def _unknown(config: dict[str, Any]) -> Iterator[str]:
    """A sentence on what nobody has looked at, and which is switched on."""
    kind = config["model_type"]
    known = {*MEANINGLESS, *FIXED, *REQUIRED[kind], *USED[kind]}
    if kind == "qwen2":  # its biases are no choice
        known.add("attention_bias")
    if kind == "qwen3_moe":  # of layers without experts
        known |= {"intermediate_size", "mlp_only_layers"}
    odd = [f"{key}={value!r}" for key, value in config.items() if key not in known and value]
    if odd:
        yield (
            f"has settings that this program does not know: {', '.join(odd)}. What they change "
            "would be lost. Take those out of config.json that change nothing."
        )


def _activations() -> dict[str, Activation]:
    return {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {
        "gelu_pytorch_tanh": Activation.gelu_tanh
    }


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings: transformers 5 writes rope_parameters, 4 rope_theta and rope_scaling."""
    rope = {
        **({"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}),
        **(config.get("rope_scaling") or {}),
        **(config.get("rope_parameters") or {}),
    }
    return {**rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}


def _from_gpt2(config: dict[str, Any], name: str) -> ModelConfig:
    """Our settings of a GPT-2's config.json."""
    return ModelConfig(
        name=name,
        num_layers=config["n_layer"],
        hidden_size=config["n_embd"],
        num_attention_heads=config["n_head"],
        ffn_hidden_size=config.get("n_inner") or 4 * config["n_embd"],
        vocab_size=config["vocab_size"],
        max_seq_len=config.get("n_positions", 1024),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=_activations()[config.get("activation_function", "gelu_new")],
        tied_embeddings=config.get("tie_word_embeddings", True),
    )


def _from_decoder(config: dict[str, Any], name: str) -> ModelConfig:
    """Our settings of a Llama's, Qwen's or Mixtral's config.json."""
    kind, rope = config["model_type"], _rope(config)
    scaling = rope["rope_type"]
    return ModelConfig(
        name=name,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        ffn_hidden_size=config.get("moe_intermediate_size") or config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_seq_len=config.get("max_position_embeddings", 2048),
        position=Position.rope,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling=RopeScaling.none if scaling == "default" else RopeScaling[scaling],
        rope_scaling_factor=float(rope["factor"]) if scaling != "default" else 1.0,
        rope_original_max_seq_len=rope.get("original_max_position_embeddings", 8192),
        normalization=Normalization.rmsnorm,
        norm_eps=config["rms_norm_eps"],
        activation=Activation.swiglu,
        bias=bool(config.get("mlp_bias")),
        qkv_bias=kind == "qwen2" or bool(config.get("attention_bias")),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        tied_embeddings=config.get("tie_word_embeddings", False),
        moe=MoeConfig(num_experts=config["num_local_experts"], top_k=config["num_experts_per_tok"])
        if kind in ("mixtral", "qwen3_moe")
        else MoeConfig(),
    )
