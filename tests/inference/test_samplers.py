"""What is asked for is what is drawn, through transformers and through our own forward pass."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline.errors import CheckpointError
from pipeline.huggingface.writer import DType, export
from pipeline.inference.generation import GenerateConfig
from pipeline.inference.samplers import LocalSampler, TransformersSampler, cut_at_stop, open_sampler
from tests.support.exported import save_models, tokenizer_file
from tests.support.layouts import MODELS
from tests.support.ranks import run_on_ranks
from tests.support.unwritten import with_nan_memory


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of GPT-2."""
    root = tmp_path_factory.mktemp("checkpoints")
    run_on_ranks(save_models, 1, {"gpt2": MODELS["gpt2"]}, root, tokenizer_file(root))
    return root


def both_samplers(root: Path) -> dict[str, list[str]]:
    """Greedy continuations of the same model by both samplers."""
    warnings.simplefilter("ignore")
    cfg = GenerateConfig(checkpoint=str(root / "gpt2"), temperature=0.0, max_new_tokens=12)
    prompts = ["t5 t6 t7", "t1"]
    export(next((root / "gpt2").glob("step-*")), root / "gpt2-hf", dtype=DType.fp32)
    theirs = TransformersSampler(root / "gpt2-hf", cfg)
    with open_sampler(cfg) as ours:
        assert isinstance(ours, LocalSampler)
        return {
            "transformers": [theirs.sample([prompt], on_text=None)[0] for prompt in prompts],
            "their batch": theirs.sample(prompts, on_text=None),
            "own": [ours.sample([prompt], on_text=None)[0] for prompt in prompts],
            "own batch": ours.sample(prompts, on_text=None),
        }


def test_our_sampler_and_transformers_continue_alike(checkpoints: Path) -> None:
    """Greedy, alone and left-padded in a batch."""
    found = run_on_ranks(with_nan_memory, 1, both_samplers, checkpoints)[0]
    words = {kind: [text.split() for text in texts] for kind, texts in found.items()}
    assert words["transformers"] == words["their batch"] == words["own"] == words["own batch"]
    assert len(words["own"][0]) == 12


def ends_of_the_record(root: Path, end: int) -> dict[str, list[str]]:
    """What both samplers, and the stream of one, give where `end` ends the datasets' documents."""
    warnings.simplefilter("ignore")
    folder = root / "named-end"
    shutil.copytree(next((root / "gpt2").glob("step-*")), folder)
    record = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps(record | {"eod": end}))
    export(folder, root / "named-end-hf", dtype=DType.fp32)
    cfg = GenerateConfig(checkpoint=str(folder), temperature=0.0, max_new_tokens=12)
    found: dict[str, list[str]] = {"stream": []}
    exported = TransformersSampler(root / "named-end-hf", cfg)
    found["batch"] = exported.sample(["t5 t6 t7", ""], on_text=None)
    exported.sample(["t5 t6 t7"], on_text=found["stream"].append)
    found["own"] = LocalSampler(folder, cfg).sample(["t5 t6 t7"], on_text=None)
    return found


def test_text_ends_with_the_token_that_ends_the_datasets_documents(checkpoints: Path) -> None:
    """The record's, here an ordinary word, not the first known name in the tokenizer."""
    words = run_on_ranks(both_samplers, 1, checkpoints)[0]["own"][0].split()
    found = run_on_ranks(ends_of_the_record, 1, checkpoints, int(words[0][1:]))[0]
    assert [found["batch"][0], found["own"][0], "".join(found["stream"])] == [""] * 3


class Letters:
    """A decoder that says one word, and a tokenizer whose ids are letters."""

    def __init__(self, word: str, *, scale: float = 1.0) -> None:
        self.word, self.scale, self.backend = word, scale, self

    def begin(self, rows: list[list[int]]) -> tuple[torch.Tensor, SimpleNamespace]:
        memory = SimpleNamespace(length=0)
        return self.read(torch.zeros(1, 1), memory), memory

    def read(self, tokens: torch.Tensor, memory: SimpleNamespace) -> torch.Tensor:
        memory.length += 1
        return self.scale * F.one_hot(torch.tensor([ord(self.word[memory.length - 1])]), 128)

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


def sampler_of(letters: Letters, **settings: Any) -> LocalSampler:
    sampler = LocalSampler.__new__(LocalSampler)
    sampler.cfg = GenerateConfig(temperature=0.0, **settings)
    sampler.decoder = sampler.tokenizer = letters  # type: ignore[assignment]
    sampler.max_seq_len, sampler.ends = 100, {ord(".")}
    return sampler


@pytest.mark.parametrize(
    "word, text", [("to END.", "to "), ("to EN.", "to EN"), ("to E", "to E"), (".", "")]
)
def test_what_is_heard_is_what_is_said(word: str, text: str) -> None:
    """Of `END`, which stops it and comes letter by letter, `EN` was heard."""
    heard: list[str] = []
    sampler = sampler_of(Letters(word), stop=["END"], max_new_tokens=len(word))
    assert sampler._continue([[0]], heard.append) == ["".join(heard)] == [text]


def test_a_model_that_has_diverged_is_named() -> None:
    """torch says of it that a probability is negative or no number."""
    with pytest.raises(CheckpointError, match="no number: it has diverged"):
        sampler_of(Letters("a", scale=math.nan))._continue([[0]], None)


def said_of_no_numbers(root: Path) -> list[str]:
    """What sampling a Hugging Face folder ends in, whose final norm has no number; drawn, and greedily."""
    warnings.simplefilter("ignore")
    folder = root / "diverged"
    export(next((root / "gpt2").glob("step-*")), folder, dtype=DType.fp32)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["transformer.ln_f.bias"][3] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    found = []
    for temperature in (1.0, 0.0):
        cfg = GenerateConfig(checkpoint=str(folder), temperature=temperature, max_new_tokens=2)
        with open_sampler(cfg) as sampler:
            try:
                sampler.sample(["t5"], on_text=None)
            except CheckpointError as error:
                found.append(str(error))
    return found


def test_a_folder_of_a_model_that_has_diverged_is_named(checkpoints: Path) -> None:
    """Drawn it ended in torch's own error; greedily in tokens that nobody had said."""
    found = run_on_ranks(said_of_no_numbers, 1, checkpoints)[0]
    assert len(found) == 2 and all("no number: it has diverged" in one for one in found)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_cut_text_holds_no_stop_string(text: str, stop: list[str]) -> None:
    """The longest beginning without one."""
    cut = cut_at_stop(text, stop)
    assert text.startswith(cut) and not any(end in cut for end in stop)
    assert cut == text or any(text[len(cut) :].startswith(end) for end in stop)
