"""GPT2LMHeadModel: learned positions, LayerNorm, Conv1D layers that hold transposed matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.choices import Activation
from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import resolve
from pipeline.huggingface.rules import (
    Join,
    Mapping,
    Rule,
    Split,
    concatenate,
    has_bias,
    head_rules,
    split_and_join_qkv,
    tie,
)

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATIONS = {
    Activation.gelu: "gelu",
    Activation.gelu_tanh: "gelu_new",
    Activation.squared_relu: "relu2",
}


def gpt2(model: ModelConfig) -> Mapping:
    """GPT2LMHeadModel of a model that it computes."""
    hidden, ffn = model.hidden_size, resolve(model).ffn_hidden_size
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
    split, join = split_and_join_qkv(model)
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
            if has_bias(model, ours):
                rules.append(
                    _conv1d(f"{at}.{ours}.bias", f"{there}.{theirs}.bias", to_parts, from_parts)
                )
            else:
                zeros[f"{there}.{theirs}.bias"] = (size,)
    return Mapping("GPT2LMHeadModel", config | tie(model), rules + head_rules(model), zeros)


def _norms(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in ("weight", "bias")]


def _conv1d(ours: str, theirs: str, split: Split, join: Join) -> Rule:
    """GPT-2's Conv1D: one matrix, transposed (its biases are vectors: t() leaves them)."""

    def back(parts: list[Tensor]) -> Tensor:
        rows = parts[0].t()
        return join(
            list(rows.chunk(3))
            if ours.endswith(("linear_qkv.weight", "linear_qkv.bias"))
            else [rows]
        )

    return Rule(ours, (theirs,), lambda whole: [concatenate(split(whole)).t()], back)


def _same(whole: Tensor) -> list[Tensor]:
    return [whole]


def _only(parts: list[Tensor]) -> Tensor:
    return parts[0]
