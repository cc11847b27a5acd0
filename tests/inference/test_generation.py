"""What cannot be asked is refused before a model is loaded: by numbers, and by the folder's small files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CheckpointError, ConfigError
from pipeline.inference import generation, samplers
from pipeline.inference.generation import GenerateConfig, check_drawing
from pipeline.inference.samplers import open_sampler
from tests.support.exported import save_models, tokenizer_file
from tests.support.layouts import MODELS
from tests.support.ranks import run_on_ranks


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"temperature": -1.0}, "at least 0"), ({"temperature": float("nan")}, "at least 0"),
        ({"top_p": 0.0}, "in \\(0, 1]"), ({"top_k": -1}, "at least 0"),
        ({"num_samples": 0}, "at least 1"), ({"batch_size": 0}, "at least 1"),
        ({"max_new_tokens": 0}, "at least 1"), ({"seed": 2**64}, "64 bits"),
        ({"seed": -(2**63) - 1}, "64 bits"), ({"stop": ["a", ""]}, "empty text"),
        ({"chat": True, "prompt": "t1"}, "prompt and chat are several ways"),
        ({"interactive": True, "file": "prompts.txt"}, "file and interactive"),
        ({"interactive": True, "num_samples": 2}, "num_samples=2 has no effect with interactive"),
        ({"chat": True, "num_samples": 2}, "num_samples=2 has no effect with chat"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    """Also those that would have no effect, and a seed that torch refuses after seconds."""
    with pytest.raises(ConfigError, match=message):
        check_drawing(GenerateConfig(checkpoint="nowhere", **wrong))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of GPT-2, without a chat template."""
    root = tmp_path_factory.mktemp("checkpoints")
    run_on_ranks(save_models, 1, {"gpt2": MODELS["gpt2"]}, root, tokenizer_file(root))
    return next((root / "gpt2").glob("step-*"))


def nothing_is_loaded(*_: Any, **__: Any) -> None:
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize(
    "change, wrong, message",
    [
        ("", {"image": "x.png"}, "reads no pictures"),
        ("tokenizer", {}, "has no tokenizer.json"), ("base", {}, "base of this adapter is not in"),
        ("nowhere", {}, "is no folder"), ("llava", {"chat": True, "image": "x.png"}, "no chat template"),
        ("theirs", {"image": "x.png"}, "reads no pictures"),
        ("without transformers", {}, "is not installed: pip install"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_asked_so_is_refused_before_it_is_loaded(
    change: str, wrong: dict[str, Any], message: str, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """By its record, its folder, and what is installed."""
    for kind in ("TransformersSampler", "LocalSampler"):
        monkeypatch.setattr(samplers, kind, nothing_is_loaded)
    shutil.copytree(folder, path := tmp_path / "step-00000001")
    if change == "tokenizer":
        (path / "tokenizer.json").unlink()
    elif change == "base":
        record = json.loads((path / "checkpoint.json").read_text())
        record["base"] = {"path": str(tmp_path / "gone"), "sha256": 64 * "0"}
        (path / "checkpoint.json").write_text(json.dumps(record))
    elif change == "nowhere":
        path = tmp_path / "nowhere"
    elif change:
        kind = "llava" if change == "llava" else "gpt2"
        (path / "config.json").write_text(json.dumps({"model_type": kind}))
        (path / "tokenizer_config.json").write_text("{}")
        (path / "model.safetensors").write_bytes(b"")
    if change == "without transformers":
        monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        with open_sampler(GenerateConfig(checkpoint=str(path), **wrong)):
            pass
