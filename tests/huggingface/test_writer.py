"""To Hugging Face: the same logits, whatever the sizes."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.record import read_record
from pipeline.checkpoint.tensors import CheckpointTensors
from pipeline.data import pii_report
from pipeline.data.tokenizer import Tokenizer
from pipeline.huggingface import writer
from pipeline.huggingface.mapping import mapping_for
from pipeline.huggingface.writer import DType, export, model_card, write_tokenizer
from pipeline.log import logger
from pipeline.training.privacy import _says_it_in_words
from tests.support.corpus import edit_tokenizer, make_texts, make_tokenizer
from tests.support.exported import (
    EXPORTED,
    TOLERANCE,
    export_and_compare,
    save_models,
    tokenizer_file,
)
from tests.support.layouts import VOCAB
from tests.support.ranks import run_on_ranks
from tests.support.tokenizers import EXACT, FORGETFUL, build


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_model_has_our_logits(name: str, exported: tuple[Path, dict[str, float]]) -> None:
    """Against transformers' own classes, in fp32."""
    assert exported[1][name] <= TOLERANCE


@pytest.mark.slow
def test_experts_that_were_spread_over_ranks_are_exported_like_others(tmp_path: Path) -> None:
    """A checkpoint does not tell which rank held an expert."""
    mixtures = {name: EXPORTED[name] for name in ("mixtral", "qwen3-moe")}
    root, output = tmp_path / "runs", tmp_path / "exported"
    root.mkdir()
    run_on_ranks(save_models, 2, mixtures, root, tokenizer_file(root), 2)
    found = run_on_ranks(export_and_compare, 1, list(mixtures), root, output, DType.fp32)[0]
    assert max(found.values()) <= TOLERANCE


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
    assert "| Personal data in the training text | not looked for |" in card
    assert "| Memorization | not measured |" in card
    generation = json.loads((exported[0] / "gpt2" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == VOCAB - 1


def test_card_says_which_data_what_was_found_in_them_and_epsilon(
    checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What a private run has promised, and what somebody has found, is worth nothing if no reader is told."""
    spent = {"epsilon": 4.7, "delta": 1e-5, "clip_norm": 1.0, "noise_multiplier": 1.0, "reads": 1, "unit": "a row"}  # fmt: skip
    record = replace(
        read_record(folders.find(checkpoints / "gpt2")),
        loader={"datasets": {"ab" * 32: {"name": "web"}}},
        privacy=spent,
    )
    found = {"web": {"documents": 100, "with_any": 2, "found": {"emails": 3}}}
    (tmp_path / pii_report.NAME).write_bytes(pii_report.to_json(found))
    card = model_card(record, mapping_for(record.model()), DType.bf16, checkpoint=tmp_path)
    assert "| Dataset identities (SHA-256) | web abababababababab... |" in card
    assert "3 emails" in card and "left in 2.000% of 100 documents |" in card
    assert "| Differential privacy | epsilon 4.70 at delta 1e-05 for a row; " in card
    # A start with these weights repeats what the card says, which alone knows of it.
    (tmp_path / "README.md").write_text(card)
    assert not _says_it_in_words(tmp_path), "a checkpoint, whose record is read"
    (tmp_path / "config.json").write_text("{}")
    caplog.set_level("INFO", logger=logger.name)
    assert _says_it_in_words(tmp_path)
    said = " ".join(caplog.text.split())
    assert "says of privacy: epsilon 4.70 at delta 1e-05 for a row; each was read at most 1" in said
    assert "begin with the checkpoint instead of the export" in said


# AutoTokenizer takes the name of a special token in a text for the token: texts without.
TEXTS = [
    *(text for text in make_texts(20) if "<|endoftext|>" not in text),
    "a  b",
    " begins with a space",
]


def theirs(tokenizer: Tokenizer, folder: Path) -> Any:
    """The AutoTokenizer of the files that an export writes."""
    from transformers import AutoTokenizer

    (folder / "config.json").write_text('{"model_type": "llama"}')
    write_tokenizer(tokenizer, folder, max_seq_len=8)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", [*EXACT, *FORGETFUL])
def test_exported_tokenizer_gives_the_ids_of_training(family: str, tmp_path: Path) -> None:
    """Of every family."""
    ours = build({**EXACT, **FORGETFUL}[family], tmp_path)
    exported = theirs(ours, tmp_path)
    assert [exported(text)["input_ids"] for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert exported.eos_token_id == ours.eod


def test_exported_tokenizer_puts_nothing_before_a_text_and_cuts_nothing(tmp_path: Path) -> None:
    """Templates of Llama and others put `<s>` there, which no document of training had."""
    path = make_tokenizer(tmp_path / "tokenizer.json")
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing", "single": [end, text], "pair": [end, text, end, text],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }  # fmt: skip
    ours = Tokenizer.from_file(edit_tokenizer(path, truncation=truncation, post_processor=template))
    assert ours.backend.encode("x").ids[0] == 0, "the template must put the end before a text"
    exported = theirs(ours, tmp_path)
    assert [exported(text)["input_ids"] for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    written = Tokenizer.from_file(tmp_path)
    assert written.sha256 != ours.sha256 and written.ids_sha256 == ours.ids_sha256


def test_an_ordinary_word_that_ends_documents_stays_a_word(tmp_path: Path) -> None:
    """As a special token it would be cut out of words: the ids of texts would change."""
    path = make_tokenizer(tmp_path / "tokenizer.json")
    ours = Tokenizer.from_file(path, eod="e")
    exported = theirs(ours, tmp_path)
    assert [exported(text)["input_ids"] for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert exported.eos_token is None


def test_end_of_documents_is_the_datasets(checkpoints: Path, tmp_path: Path) -> None:
    """The checkpoint's record has it: a guess from the tokenizer's names may be another token."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(folders.find(checkpoints / "gpt2"), checkpoint)
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    (checkpoint / "checkpoint.json").write_text(json.dumps(record | {"eod": 5}))
    export(checkpoint, tmp_path / "out", dtype=DType.fp32)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == 5
