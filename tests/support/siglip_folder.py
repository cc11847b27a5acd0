"""A Hugging Face folder of a small SigLIP, written without transformers or with a Llama by it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig
from pipeline.config.parameter_names import parameter_shapes
from pipeline.huggingface.llava import tower_rules
from tests.support.exported import tokenizer_file
from tests.support.layouts import VOCAB
from tests.support.llama_folder import LLAMA

TOWER: dict[str, Any] = {
    "model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 18, "patch_size": 8, "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6, "num_channels": 3,
}  # fmt: skip


def write_tower(folder: Path, model: ModelConfig) -> dict[str, Tensor]:
    """The tower alone, its weights drawn; they are returned under our names.

    Args:
        model: whose encoder is the tower's.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(TOWER))
    shapes = parameter_shapes(model, FinetuneConfig(), vocab_size=VOCAB)
    draw, ours, theirs = torch.Generator().manual_seed(5), {}, {}
    for rule in tower_rules(model, "vision_model."):
        ours[rule.name] = torch.randn(shapes[rule.name], generator=draw)
        parts = rule.split(ours[rule.name])
        theirs |= {name: part.contiguous() for name, part in zip(rule.theirs, parts, strict=True)}
    save_file(theirs, folder / "model.safetensors")
    return ours


def make_folders(root: Path) -> tuple[Path, Path]:
    """A Llama and a whole SigLIP, text tower, pooling head and all, as transformers saves them."""
    from transformers import LlamaConfig, LlamaForCausalLM, SiglipConfig, SiglipModel

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}  # fmt: skip
    siglip = SiglipModel(SiglipConfig(vision_config=TOWER, text_config=text))
    for parameter in siglip.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    siglip.save_pretrained(root / "siglip")
    llama = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "vocab_size": 250}))
    llama.save_pretrained(root / "llama")
    tokenizer_file(root / "llama")
    return root / "llama", root / "siglip"
