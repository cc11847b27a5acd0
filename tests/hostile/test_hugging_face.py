"""Hostile Hugging Face folders: every use ends well or in a PipelineError; no traceback, hang, code or file elsewhere."""

from __future__ import annotations

import builtins
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import CheckpointError
from tests.support.hostile import (
    Damage,
    all_of,
    every,
    of_file,
    of_json,
    pickle_of,
    try_all,
    with_content,
)

torch = pytest.importorskip("torch")
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 64, "rms_norm_eps": 1e-5, "head_dim": 8,
    "max_position_embeddings": 64, "rope_theta": 5e5, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "attention_bias": False, "mlp_bias": False,
    "quantization_config": None, "layer_types": ["full_attention"], "sliding_window": None,
}  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (64, 32), "lm_head.weight": (64, 32), "model.norm.weight": (32,),
    **{f"model.layers.0.{name}.weight": shape for name, shape in {
        "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48),
        "input_layernorm": (32,), "post_attention_layernorm": (32,),
    }.items()},
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "n_inner": 48, "n_positions": 64, "vocab_size": 64,
    "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True,
}  # fmt: skip


def safetensors_with(changed: dict[str, Any] | bytes, *, size: int | None = None) -> bytes:
    """A file of this header, and a float behind it."""
    text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + bytes(4)


def folder_of(path: Path, config: dict[str, Any] = LLAMA) -> Path:
    """A model that transformers would write, of ones."""
    from safetensors.numpy import save_file

    path.mkdir()
    save_file({n: np.ones(s, np.float32) for n, s in SHAPES.items()}, path / "model.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    (path / "config.json").write_text(json.dumps(config))
    return path


INDEX = {"metadata": {}, "weight_map": dict.fromkeys(SHAPES, "model.safetensors")}
FIELDS = [("dtype", "I8"), ("dtype", "X"), ("shape", [2**62]), ("shape", [-1]), ("shape", "x"),
          ("data_offsets", [0, 2**60]), ("data_offsets", [-4, 0]), ("data_offsets", [4, 0])]  # fmt: skip


def test_hugging_face_folders(tmp_path, outside, capsys):
    """What init_from, export's bases and hf_import read."""
    from pipeline import hf_import
    from pipeline.checkpoint.adapters import base_of
    from pipeline.huggingface.loading import check_folder
    from pipeline.huggingface.reader import HuggingFaceWeights
    from pipeline.huggingface.settings import read_model_config

    valid = folder_of(tmp_path / "valid")
    model = read_model_config(valid)

    def use(folder: Path) -> None:
        def read() -> None:
            weights = HuggingFaceWeights(folder, model)
            for name in weights._rules:
                weights.whole(name)

        importing = hf_import.ImportConfig(folder=str(folder))
        all_of(
            read,
            lambda: hf_import.main(importing),
            lambda: check_folder(folder),
            lambda: base_of(folder),
        )

    def cases() -> Iterator[tuple[str, str, Damage]]:
        files = ["config.json", "model.safetensors", "model.safetensors.index.json"]
        yield from every(files, of_file(outside))
        for content in (LLAMA, GPT2):
            for name, damage in of_json(content):
                yield "config.json", f"{content['model_type']}: {name}", damage
        for name, damage in of_json(INDEX, depth=1):
            yield "model.safetensors.index.json", name, damage
        part = {"weight_map": {"lm_head.weight": "model.safetensors"}}
        for name, damage in of_json(part):
            yield "model.safetensors.index.json", f"one: {name}", damage
        one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        for key, value in FIELDS:
            damage = with_content(safetensors_with({"lm_head.weight": one | {key: value}}))
            yield "model.safetensors", f"{key}={value}", damage
        for size in (0, 7, 2**40, 2**64 - 1):
            damage = with_content(safetensors_with({"x": one}, size=size))
            yield "model.safetensors", f"header of {size}", damage

    try_all(valid, use, cases(), least=400)


def test_peft_folders(tmp_path, outside, capsys):
    """What goes on training an adapter reads; its base may be named as anything, and is not followed."""
    from safetensors.numpy import save_file

    from pipeline.config.finetune import FinetuneConfig
    from pipeline.huggingface.peft_reader import PeftMatrices
    from pipeline.huggingface.settings import read_model_config

    model = read_model_config(folder_of(tmp_path / "model"))
    finetune = FinetuneConfig(train=["*.lora_?"], lora_rank=4, lora_alpha=8.0)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "/nowhere"}
    config |= {"auto_mapping": {"base_model_class": "E", "parent_library": "evil"}}
    valid = tmp_path / "valid"
    valid.mkdir()
    at = "base_model.model.model.layers.0.self_attn.o_proj.lora_"
    save_file({f"{at}{n}.weight": np.ones(s, np.float32) for n, s in {"A": (4, 32), "B": (32, 4)}.items()},
              valid / "adapter_model.safetensors")  # fmt: skip
    (valid / "adapter_config.json").write_text(json.dumps(config))

    def use(folder: Path) -> None:
        found = PeftMatrices(folder, model, finetune)
        for stem in found.stems:
            found.pair(stem)

    def cases() -> Iterator[tuple[str, str, Damage]]:
        yield from every(["adapter_config.json", "adapter_model.safetensors"], of_file(outside))
        for name, damage in of_json(config):
            yield "adapter_config.json", name, damage
        one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        for key, value in FIELDS:
            damage = with_content(safetensors_with({f"{at}A.weight": one | {key: value}}))
            yield "adapter_model.safetensors", f"{key}={value}", damage

    try_all(valid, use, cases(), least=150)


# name -> (change of a folder with a file `code`, what is said; empty: it is loaded without that)
ASKS: dict[str, tuple[Callable[[Path, str], Any], str]] = {
    "an adapter": (
        lambda folder, _: (folder / "adapter_config.json").write_text(json.dumps(ADAPTER)),
        "holds an adapter",
    ),
    "kernels": (
        lambda folder, _: rewrite(folder / "config.json", attn_implementation="evil/kernels"),
        "asks for code from elsewhere: attn_implementation",
    ),
    "a pickle": (
        lambda folder, _: [path.unlink() for path in folder.glob("model*")],
        "has no \\*.safetensors",
    ),
    "weights elsewhere": (
        lambda folder, _: (
            (folder / "model.safetensors").unlink(),
            rewrite(
                folder / "model.safetensors.index.json",
                weight_map={"lm_head.weight": "../outside/precious.safetensors"},
            ),
        ),
        "no \\*.safetensors file of its folder",
    ),
    "a class": (
        lambda folder, code: (
            rewrite(folder / "config.json", model_type="evil", auto_map=AUTO),
            (folder / "evil.py").write_text(code),
        ),
        "transformers cannot load",
    ),
    "a tokenizer class": (
        lambda folder, code: (
            (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": AUTO})),
            (folder / "evil.py").write_text(code),
        ),
        "has no tokenizer that transformers can load",
    ),
    "its own generate": (
        lambda folder, code: (
            (folder / "custom_generate").mkdir(),
            (folder / "custom_generate/generate.py").write_text(code),
        ),
        "has no tokenizer",
    ),
    "a pipe": (lambda folder, _: os.mkfifo(folder / "vocab.json"), "cannot be read"),
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "/nowhere",
    "auto_mapping": {"base_model_class": "E"},
}
AUTO = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_is_loaded_for_no_more_than_it_is(tmp_path, outside, monkeypatch):
    """transformers loads other weights, code and kernels where a folder asks, or asks on the terminal."""
    pytest.importorskip("transformers")
    from pipeline.huggingface.loading import load_tokenizer, load_transformers

    def asked(*_: Any) -> str:
        raise AssertionError("somebody is asked on the terminal")

    monkeypatch.setattr(builtins, "input", asked)
    code = f"import os\nos.mkdir({str(outside.with_name('code-was-run'))!r})\n"
    for number, (name, (change, said)) in enumerate(ASKS.items()):
        folder = folder_of(tmp_path / str(number))
        (folder / "pytorch_model.bin").write_bytes(pickle_of(outside.with_name("code-was-run")))
        change(folder, code)
        with pytest.raises(CheckpointError, match=said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_transformers(folder, torch.float32, torch.device("cpu"))
            load_tokenizer(folder)
        assert name
