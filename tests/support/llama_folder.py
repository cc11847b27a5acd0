"""A Hugging Face folder of a small Llama, written without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

# config.json of a Llama that transformers would write.
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 64, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "rope_theta": 5e5, "hidden_act": "silu",
}  # fmt: skip
# The same model in our settings, for the command line.
SETTINGS = """model.num_layers=2 model.hidden_size=32 model.num_attention_heads=4 model.num_query_groups=2
    model.ffn_hidden_size=48 model.max_seq_len=64 model.position=rope model.rope_theta=5e5
    model.normalization=rmsnorm model.activation=swiglu model.bias=false model.tied_embeddings=false""".split()
_LAYER = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48),
    "input_layernorm": (32,), "post_attention_layernorm": (32,),
}  # fmt: skip
LLAMA_NAMES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (64, 32), "lm_head.weight": (64, 32), "model.norm.weight": (32,),
    **{f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in _LAYER.items()},
}  # fmt: skip


def write_llama(folder: Path, **config: Any) -> Path:
    """The folder, its weights drawn; `config` changes its config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **config}))
    draw = np.random.default_rng(0)
    tensors = {n: draw.normal(size=s).astype(np.float32) for n, s in LLAMA_NAMES.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder
