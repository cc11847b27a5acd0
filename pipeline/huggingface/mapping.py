"""One model, two spellings: our parameters and settings, and those of a transformers class.

    mapping_for(model) -> Mapping(class, config.json, one Rule a parameter)   export.py writes, hf_import.py reads by it

Layouts that differ: our qkv rows are [group][queries of the group, key, value][head_dim], theirs
three matrices (GPT-2: one [q; k; v]); GPT-2's Conv1D holds transposed matrices; our gated fc1 is
[gate; up], theirs two matrices. Rotary positions are rotate-half in both. A model that no class
computes is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.config.choices import (
    Activation,
    Init,
    Normalization,
    NormPlacement,
    Position,
    RopeScaling,
)
from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import ffn_width, head_width
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATIONS = {
    Activation.gelu: "gelu",
    Activation.gelu_tanh: "gelu_new",
    Activation.squared_relu: "relu2",
}
Split = Callable[["Tensor"], "list[Tensor]"]
Join = Callable[["list[Tensor]"], "Tensor"]
# What transformers calls llama3 scaling's constants; ours are in model/rope.py.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclass(frozen=True)
class Rule:
    """How one of our parameters is spelt."""

    name: str
    """Canonical name."""
    theirs: tuple[str, ...]
    split: Split = lambda whole: [whole]
    """Our tensor to theirs."""
    join: Join = lambda parts: parts[0]
    """Theirs to ours."""


@dataclass(frozen=True)
class Mapping:
    """A transformers class that computes a model of ours."""

    architecture: str
    config: dict[str, Any]
    rules: list[Rule]
    zeros: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Tensors the class has and we have not: biases, which are 0."""


def mapping_for(model: ModelConfig) -> Mapping:
    """The transformers class of a model, whose vocab_size is set.

    Raises:
        ConfigError: no class computes it; the message says why.
    """
    is_gpt2 = model.position is Position.learned and model.normalization is Normalization.layernorm
    reasons = list(_obstacles(model, is_gpt2=is_gpt2))
    if reasons:
        raise ConfigError(
            f"no transformers class computes this model: {'; '.join(reasons)}. It can be trained, "
            "evaluated and sampled (python -m pipeline.generate), but not exported."
        )
    if is_gpt2:
        return _gpt2(model)
    return _moe(model) if model.moe.num_experts else _llama(model)


def _obstacles(model: ModelConfig, *, is_gpt2: bool) -> Iterator[str]:
    """What GPT2LMHeadModel, or the Llama family, cannot compute."""
    groups = model.num_query_groups or model.num_attention_heads
    if model.norm_placement is NormPlacement.post:
        yield "model.norm_placement=post"
    if model.parallel_residual:
        yield "model.parallel_residual=true"
    if model.logit_softcap:
        yield f"model.logit_softcap={model.logit_softcap}"
    if model.init is Init.mup:
        yield "model.init=mup (it scales attention and logits differently)"
    if is_gpt2:
        if model.activation is Activation.swiglu:
            yield "GPT-2 has no model.activation=swiglu"
        if groups != model.num_attention_heads:
            yield f"GPT-2 has no grouped queries (model.num_query_groups={groups})"
        if model.qk_norm:
            yield "GPT-2 has no model.qk_norm"
        if head_width(model) * model.num_attention_heads != model.hidden_size:
            heads = f"{head_width(model)} * {model.num_attention_heads}"
            yield f"GPT-2 needs head_dim * num_attention_heads = hidden_size ({model.hidden_size}), not {heads}"
        if model.moe.num_experts:
            yield "GPT-2 has no experts"
        return
    if model.position is not Position.rope or model.normalization is not Normalization.rmsnorm:
        yield f"model.position={model.position.name} with model.normalization={model.normalization.name}"
    if model.activation is not Activation.swiglu:
        yield f"Llama has no model.activation={model.activation.name}"
    if model.hidden_size % model.num_attention_heads:
        yield "Llama needs hidden_size to be a multiple of num_attention_heads"
    if (model.qk_norm or model.moe.num_experts) and model.bias:
        yield "Qwen3 and Mixtral have no biases in the MLP (model.bias=true)"
    if model.moe.num_experts and model.moe.top_k == 1 and not model.qk_norm:
        yield "Mixtral gives a single chosen expert the weight 1 (model.moe.top_k=1)"
    if model.moe.num_experts and not model.qk_norm and model.qkv_bias:
        yield "Mixtral has no model.qkv_bias"
    if model.moe.shared_expert_ffn_hidden_size:
        yield "a shared expert without a gate (model.moe.shared_expert_ffn_hidden_size)"


def _gpt2(model: ModelConfig) -> Mapping:
    hidden, ffn = model.hidden_size, ffn_width(model)
    config = {
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": model.max_seq_len,
        "n_embd": hidden,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_inner": ffn,
        "activation_function": ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.norm_eps,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "initializer_range": model.init_std,
    }
    rules = [
        Rule("embedding.word.weight", ("transformer.wte.weight",)),
        Rule("embedding.position.weight", ("transformer.wpe.weight",)),
        *_norms("final_norm", "transformer.ln_f"),
    ]
    split, join = _qkv(model)
    layers = [  # ours, theirs, biases, split and join of a weight in rows
        ("self_attention.linear_qkv", "attn.c_attn", 3 * hidden, split, join),
        ("self_attention.linear_proj", "attn.c_proj", hidden, _same, _only),
        ("mlp.linear_fc1", "mlp.c_fc", ffn, _same, _only),
        ("mlp.linear_fc2", "mlp.c_proj", hidden, _same, _only),
    ]
    zeros: dict[str, tuple[int, ...]] = {}
    for i in range(model.num_layers):
        at, there = f"layers.{i}", f"transformer.h.{i}"
        rules += _norms(f"{at}.input_layernorm", f"{there}.ln_1") + _norms(
            f"{at}.pre_mlp_layernorm", f"{there}.ln_2"
        )
        for ours, theirs, size, to_parts, from_parts in layers:
            rules.append(
                _conv1d(f"{at}.{ours}.weight", f"{there}.{theirs}.weight", to_parts, from_parts)
            )
            if _has_bias(model, ours):
                rules.append(
                    _conv1d(f"{at}.{ours}.bias", f"{there}.{theirs}.bias", to_parts, from_parts)
                )
            else:
                zeros[f"{there}.{theirs}.bias"] = (size,)
    return Mapping("GPT2LMHeadModel", config | _tie(model), rules + _head(model), zeros)


def _llama(model: ModelConfig) -> Mapping:
    """LlamaForCausalLM, or Qwen3ForCausalLM where queries and keys are normalised."""
    qkv_bias = model.bias if model.qkv_bias is None else model.qkv_bias
    config = {
        "model_type": "qwen3" if model.qk_norm else "llama",
        **_decoder_config(model),
        "intermediate_size": ffn_width(model),
        "attention_bias": model.bias or qkv_bias,
    }
    if not model.qk_norm:
        config["mlp_bias"] = model.bias
    rules = _decoder_rules(model)
    zeros: dict[str, tuple[int, ...]] = {}
    for i in range(model.num_layers):
        at, there = f"layers.{i}.mlp", f"model.layers.{i}.mlp"
        for kind in ["weight", "bias"] if model.bias else ["weight"]:
            gated = (f"{there}.gate_proj.{kind}", f"{there}.up_proj.{kind}")
            rules.append(Rule(f"{at}.linear_fc1.{kind}", gated, lambda w: list(w.chunk(2)), _cat))
            rules.append(Rule(f"{at}.linear_fc2.{kind}", (f"{there}.down_proj.{kind}",)))
        if qkv_bias and not model.bias:  # their switch covers the output projection too
            zeros[f"model.layers.{i}.self_attn.o_proj.bias"] = (model.hidden_size,)
        elif model.bias and not qkv_bias:
            width, groups = head_width(model), model.num_query_groups or model.num_attention_heads
            for kind, heads in (("q", model.num_attention_heads), ("k", groups), ("v", groups)):
                zeros[f"model.layers.{i}.self_attn.{kind}_proj.bias"] = (heads * width,)
    architecture = "Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"
    return Mapping(architecture, config | _tie(model), rules + _head(model), zeros)


def _moe(model: ModelConfig) -> Mapping:
    """MixtralForCausalLM, or Qwen3MoeForCausalLM with q/k-norm; several chosen experts' weights are
    renormalised.
    """
    ffn = model.moe.ffn_hidden_size or ffn_width(model)
    is_qwen = model.qk_norm
    config = {
        "model_type": "qwen3_moe" if is_qwen else "mixtral",
        **_decoder_config(model),
        "intermediate_size": ffn,
        "num_experts_per_tok": model.moe.top_k,
        "router_aux_loss_coef": model.moe.aux_loss_coeff,
    }
    if is_qwen:
        config |= {
            "num_experts": model.moe.num_experts, "moe_intermediate_size": ffn, "norm_topk_prob": model.moe.top_k > 1,
            "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": bool(model.qkv_bias),
        }  # fmt: skip
    else:
        config |= {"num_local_experts": model.moe.num_experts, "sliding_window": None}
    block, gate, up, down = (
        ("mlp", "gate_proj", "up_proj", "down_proj")
        if is_qwen
        else ("block_sparse_moe", "w1", "w3", "w2")
    )
    rules = _decoder_rules(model)
    for i in range(model.num_layers):
        at, there = f"layers.{i}.mlp", f"model.layers.{i}.{block}"
        rules.append(Rule(f"{at}.router.weight", (f"{there}.gate.weight",)))
        for e in range(model.moe.num_experts):
            ours, theirs = f"{at}.experts.local_experts.{e}", f"{there}.experts.{e}"
            gated = (f"{theirs}.{gate}.weight", f"{theirs}.{up}.weight")
            rules.append(Rule(f"{ours}.linear_fc1.weight", gated, lambda w: list(w.chunk(2)), _cat))
            rules.append(Rule(f"{ours}.linear_fc2.weight", (f"{theirs}.{down}.weight",)))
    architecture = "Qwen3MoeForCausalLM" if is_qwen else "MixtralForCausalLM"
    return Mapping(architecture, config | _tie(model), rules + _head(model))


def _decoder_config(model: ModelConfig) -> dict[str, Any]:
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
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": head_width(model),
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_std,
    }


def _decoder_rules(model: ModelConfig) -> list[Rule]:
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
            if kind == "weight" or _has_bias(model, "self_attention.linear_qkv"):
                theirs = tuple(f"{there}.self_attn.{part}_proj.{kind}" for part in "qkv")
                rules.append(Rule(f"{at}.self_attention.linear_qkv.{kind}", theirs, *_qkv(model)))
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


def _has_bias(model: ModelConfig, layer: str) -> bool:
    return model.qkv_bias if layer.endswith("qkv") and model.qkv_bias is not None else model.bias


def _norms(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in ("weight", "bias")]


def _tie(model: ModelConfig) -> dict[str, bool]:
    return {"tie_word_embeddings": model.tied_embeddings}


def _head(model: ModelConfig) -> list[Rule]:
    return [] if model.tied_embeddings else [Rule("head.weight", ("lm_head.weight",))]


def _conv1d(ours: str, theirs: str, split: Split, join: Join) -> Rule:
    """GPT-2's Conv1D: one matrix, transposed (its biases are vectors: t() leaves them)."""

    def back(parts: list[Tensor]) -> Tensor:
        rows = parts[0].t()
        return join(
            list(rows.chunk(3))
            if ours.endswith(("linear_qkv.weight", "linear_qkv.bias"))
            else [rows]
        )

    return Rule(ours, (theirs,), lambda whole: [_cat(split(whole)).t()], back)


def _same(whole: Tensor) -> list[Tensor]:
    return [whole]


def _only(parts: list[Tensor]) -> Tensor:
    return parts[0]


def _cat(parts: list[Tensor]) -> Tensor:
    import torch

    return torch.cat(parts)


def _qkv(model: ModelConfig) -> tuple[Split, Join]:
    """(our rows [group][queries, key, value][head_dim] to [q, k, v], and back), for a weight or a
    bias.
    """
    groups = model.num_query_groups or model.num_attention_heads
    queries, width = model.num_attention_heads // groups, head_width(model)

    def split(whole: Tensor) -> list[Tensor]:
        grouped = whole.reshape(groups, queries + 2, width, *whole.shape[1:])
        return [
            part.reshape(-1, *whole.shape[1:])
            for part in (grouped[:, :queries], grouped[:, queries], grouped[:, -1])
        ]

    def join(parts: list[Tensor]) -> Tensor:
        rest = parts[0].shape[1:]
        grouped = [part.reshape(groups, -1, width, *rest).transpose(0, 1) for part in parts]
        return _cat(grouped).transpose(0, 1).reshape(-1, *rest)

    return split, join
