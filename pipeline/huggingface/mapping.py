"""One model, two spellings: our parameters and settings, and those of a transformers class.

    mapping_for(model) -> Mapping(class, config.json, one Rule a parameter)
    writer.py writes by it, reader.py reads by it; families: gpt2.py, decoder.py, mixtures.py, and
    llava.py around them where the model reads pictures

A model that no class computes is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.choices import Activation, Init, Normalization, NormPlacement, Position
from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import resolve
from pipeline.errors import ConfigError
from pipeline.huggingface.decoder import llama
from pipeline.huggingface.gpt2 import gpt2
from pipeline.huggingface.llava import llava
from pipeline.huggingface.mixtures import mixture
from pipeline.huggingface.rules import Mapping


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
    family = gpt2 if is_gpt2 else mixture if model.moe.num_experts else llama
    return llava(model, family(model)) if model.vision.num_layers else family(model)


def _obstacles(model: ModelConfig, *, is_gpt2: bool) -> Iterator[str]:
    """What GPT2LMHeadModel, or the Llama family, cannot compute."""
    groups, head_dim = resolve(model).num_query_groups, resolve(model).head_dim
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
        if head_dim * model.num_attention_heads != model.hidden_size:
            heads = f"{head_dim} * {model.num_attention_heads}"
            yield (
                "GPT-2 needs head_dim * num_attention_heads = hidden_size "
                f"({model.hidden_size}), not {heads}"
            )
        if model.moe.num_experts:
            yield "GPT-2 has no experts"
        return
    if model.position is not Position.rope or model.normalization is not Normalization.rmsnorm:
        yield (
            f"model.position={model.position.name} with "
            f"model.normalization={model.normalization.name}"
        )
    if model.activation is not Activation.swiglu:
        yield f"Llama has no model.activation={model.activation.name}"
    if model.hidden_size % model.num_attention_heads:
        yield "Llama needs hidden_size to be a multiple of num_attention_heads"
    if (model.qk_norm or model.moe.num_experts) and model.bias:
        yield "Qwen3 and Mixtral have no biases in the MLP (model.bias=true)"
    if model.moe.num_experts and model.moe.top_k == 1 and not model.qk_norm:
        yield "Mixtral gives a single chosen expert the weight 1 (model.moe.top_k=1)"
    if model.moe.num_experts and not model.qk_norm and resolve(model).qkv_bias:
        yield "Mixtral has no model.qkv_bias"
    if model.moe.shared_expert_ffn_hidden_size:
        yield "a shared expert without a gate (model.moe.shared_expert_ffn_hidden_size)"
