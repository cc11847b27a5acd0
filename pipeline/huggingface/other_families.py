"""Kinds of models that cannot be read, and why: what is said where such a folder is given."""

from __future__ import annotations

# What other families have that this program has not.
OTHERS = {
    "gemma": "norms that multiply by 1 + weight, and a scaled embedding",
    "gemma2": "norms that multiply by 1 + weight, and capped attention logits",
    "gemma3_text": "norms that multiply by 1 + weight, and sliding windows",
    "gemma3": "norms that multiply by 1 + weight, and sliding windows",
    "bloom": "ALiBi in place of positions",
    "mpt": "ALiBi in place of positions",
    "gptj": "rotary positions on a part of each head",
    "codegen": "rotary positions on a part of each head",
    "cohere": "a scale of the logits",
    "olmo": "norms without weights",
    "smollm3": "layers without positions",
    "qwen3_next": "linear attention",
    "mamba": "state spaces",
    "olmo2": "norms behind attention and MLP, and q/k-norm over all heads together",
    "phi3": "query, key and value in one matrix",
    "phi": "rotary positions on a part of each head",
    "gpt_neox": "rotary positions on a part of each head",
    "stablelm": "rotary positions on a part of each head",
    "granite": "multipliers of embedding, attention, residual and logits",
    "opt": "positions counted from 2, and relu",
    "qwen2_moe": "a shared expert with a gate",
    "deepseek_v2": "latent attention",
    "deepseek_v3": "latent attention",
    "gpt_oss": "attention sinks",
}
