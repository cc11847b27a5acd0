"""To Hugging Face: the same logits, whatever the sizes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.tensors import CheckpointTensors
from pipeline.huggingface import writer
from pipeline.huggingface.writer import DType, export
from tests.support.exported import EXPORTED, TOLERANCE, export_and_compare
from tests.support.layouts import VOCAB
from tests.support.ranks import run_on_ranks


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_model_has_our_logits(name: str, exported: tuple[Path, dict[str, float]]) -> None:
    """Against transformers' own classes, in fp32."""
    assert exported[1][name] <= TOLERANCE


def test_bf16_export_has_our_logits_with_the_same_rounding(
    checkpoints: Path, tmp_path: Path
) -> None:
    """The usual export; only the rounding of the weights may differ from fp32."""
    names = ["gpt2", "qwen3"]
    found = run_on_ranks(export_and_compare, 1, names, checkpoints, tmp_path, DType.bf16)[0]
    assert max(found.values()) <= TOLERANCE
    for name in names:
        size = (tmp_path / name / "model.safetensors").stat().st_size
        whole = sum(CheckpointTensors(folders.find(checkpoints / name)).tensor(f"weights/{p}").numel()
                    for p in CheckpointTensors(folders.find(checkpoints / name)).parameters)  # fmt: skip
        assert 2 * whole < size < 2 * whole + 20_000, (
            "padding rows or a copy of the tied head were written"
        )


def test_large_models_are_written_in_shards_with_an_index(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers finds every tensor through the index."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(writer, "SHARD_BYTES", 100_000)
    export(folders.find(checkpoints / "llama"), tmp_path, dtype=DType.fp32)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 3 and all(f.stat().st_size < 110_000 for f in files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    embedding = CheckpointTensors(folders.find(checkpoints / "llama")).tensor(
        "weights/embedding.word.weight"
    )
    assert torch.equal(model.model.embed_tokens.weight.detach(), embedding)


def test_tokenizer_and_card_travel_with_the_model(exported: tuple[Path, dict]) -> None:
    """AutoTokenizer without remote code gives our ids; the card says what the model was trained on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported[0] / "gpt2")
    assert tokenizer("t5 t17 t3")["input_ids"] == [5, 17, 3]
    assert tokenizer.eos_token_id == VOCAB - 1 and tokenizer.eos_token == "<|endoftext|>"
    card = (exported[0] / "gpt2" / "README.md").read_text()
    assert "512 tokens in 1 steps" in card and "GPT2LMHeadModel" in card
    generation = json.loads((exported[0] / "gpt2" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == VOCAB - 1
