"""MixtralForCausalLM, Qwen3MoeForCausalLM: decoders whose every MLP is a mixture of experts."""

from __future__ import annotations

from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import resolve
from pipeline.huggingface.decoder import decoder_config, decoder_rules
from pipeline.huggingface.rules import Mapping, Rule, concatenate, head_rules, tie


def mixture(model: ModelConfig) -> Mapping:
    """MixtralForCausalLM, or Qwen3MoeForCausalLM with q/k-norm.

    Several chosen experts' weights are renormalised, a single one keeps its weight among all.
    """
    ffn = resolve(model).ffn_hidden_size
    is_qwen = model.qk_norm
    config = {
        "model_type": "qwen3_moe" if is_qwen else "mixtral",
        **decoder_config(model),
        "intermediate_size": ffn,
        "num_experts_per_tok": model.moe.top_k,
        "router_aux_loss_coef": model.moe.aux_loss_coeff,
    }
    if is_qwen:
        config |= {
            "num_experts": model.moe.num_experts,
            "moe_intermediate_size": ffn,
            "norm_topk_prob": model.moe.top_k > 1,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "attention_bias": resolve(model).qkv_bias,
        }
    else:
        config |= {"num_local_experts": model.moe.num_experts, "sliding_window": None}
    block, gate, up, down = (
        ("mlp", "gate_proj", "up_proj", "down_proj")
        if is_qwen
        else ("block_sparse_moe", "w1", "w3", "w2")
    )
    rules = decoder_rules(model)
    for i in range(model.num_layers):
        at, there = f"layers.{i}.mlp", f"model.layers.{i}.{block}"
        rules.append(Rule(f"{at}.router.weight", (f"{there}.gate.weight",)))
        for e in range(model.moe.num_experts):
            ours, theirs = f"{at}.experts.local_experts.{e}", f"{there}.experts.{e}"
            gated = (f"{theirs}.{gate}.weight", f"{theirs}.{up}.weight")
            rules.append(
                Rule(f"{ours}.linear_fc1.weight", gated, lambda w: list(w.chunk(2)), concatenate)
            )
            rules.append(Rule(f"{ours}.linear_fc2.weight", (f"{theirs}.{down}.weight",)))
    architecture = "Qwen3MoeForCausalLM" if is_qwen else "MixtralForCausalLM"
    return Mapping(architecture, config | tie(model), rules + head_rules(model))
