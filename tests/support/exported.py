"""Checkpoints of every model that a transformers class computes, and their export."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from pipeline.checkpoint import folder as folders
from pipeline.config.choices import RopeScaling
from pipeline.config.model import ModelConfig, MoeConfig
from pipeline.huggingface.writer import DType, export, logits_difference
from tests.support.checkpoint_runs import Run
from tests.support.layouts import MODELS, VOCAB, config

TOLERANCE = 1e-4

# Beyond tests/layouts.MODELS: sizes and switches that change the spelling.
EXPORTED: dict[str, dict[str, Any]] = {
    "gpt2": MODELS["gpt2"],
    "gpt2-untied": MODELS["gpt2-untied"],
    "gpt2-without-biases": {**MODELS["gpt2"], "bias": False, "hidden_size": 60, "num_attention_heads": 3},
    "qwen3": MODELS["modern"],
    "llama": {**MODELS["modern"], "qk_norm": False, "tied_embeddings": True},
    "llama-one-group": {
        **MODELS["modern"], "qk_norm": False, "num_query_groups": 1, "rope_scaling": RopeScaling.llama3,
        "rope_scaling_factor": 4.0, "rope_original_max_seq_len": 16, "head_dim": 24,
    },
    "llama-linear-rope": {
        **MODELS["modern"], "qk_norm": False, "rope_scaling": RopeScaling.linear, "rope_scaling_factor": 2.0,
    },
    "llama-biases": {**MODELS["modern"], "qk_norm": False, "bias": True},
    "qwen2-biases": {**MODELS["modern"], "qk_norm": False, "qkv_bias": True},
    "mixtral": {**MODELS["modern"], "qk_norm": False, "moe": MoeConfig(num_experts=4, top_k=2)},
    "qwen3-moe": {**MODELS["modern"], "moe": MoeConfig(num_experts=4, top_k=2)},
    "qwen3-moe-switch": {**MODELS["modern"], "moe": MoeConfig(num_experts=4, top_k=1)},
}  # fmt: skip


def tokenizer_file(folder: Path) -> Path:
    """A tokenizer.json of VOCAB words: t0 t1 ..., the last one ends documents."""
    words = {f"t{i}": i for i in range(VOCAB - 1)} | {"<|endoftext|>": VOCAB - 1}
    backend = Backend(WordLevel(words, unk_token="t0"))
    backend.pre_tokenizer = Whitespace()
    backend.add_special_tokens(["<|endoftext|>"])
    path = folder / "tokenizer.json"
    backend.save(str(path))
    return path


def save_models(
    models: dict[str, dict[str, Any]], root: Path, tokenizer: Path, ep: int = 1
) -> None:
    """A checkpoint of each model, trained for a step so that biases and norms are not 0 and 1. Collective."""
    for name, settings in models.items():
        cfg = config(ep=ep)
        cfg.model = ModelConfig(**settings)
        cfg.optimizer.lr = 0.03
        cfg.schedule.warmup_steps = 0
        run = Run(cfg, root / name, attachments={"tokenizer.json": tokenizer.read_bytes()})
        run.train(0, 1)
        run.save(1)
        run.close()


def export_and_compare(
    names: list[str], root: Path, output: Path, dtype: DType
) -> dict[str, float]:
    """Largest difference of logits for each model; runs in a process of its own, which has the model's groups."""
    warnings.simplefilter("ignore")  # transformers warns about its own future
    found = {}
    for name in names:
        checkpoint = folders.find(root / name)
        export(checkpoint, output / name, dtype=dtype)
        found[name] = logits_difference(checkpoint, output / name, dtype=dtype)
    return found


def exported_captions(folder: Path, files: list[bytes]) -> list[str]:
    """What transformers says of each picture, greedily, as anybody would ask it."""
    import io

    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    asked = [{"role": "user", "content": [{"type": "image"}]}]
    text, found = processor.apply_chat_template(asked, add_generation_prompt=True), []
    for start in range(0, len(files), 25):
        images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files[start : start + 25]]
        given = processor(
            text=[text] * len(images), images=[[i] for i in images], return_tensors="pt"
        )
        said = model.generate(**given, max_new_tokens=40, do_sample=False)
        found += processor.batch_decode(
            said[:, given["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return found
