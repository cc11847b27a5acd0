"""Sampling: what is asked for is what is drawn, through transformers and through our own forward pass."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.generate import GenerateConfig, main
from pipeline.inference.samplers import (
    LocalSampler,
    TransformersSampler,
    choose,
    cut_at_stop,
    open_sampler,
)
from tests.support.layouts import MODELS
from tests.support.ranks import run_on_ranks
from tests.test_export import save_models, tokenizer_file


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that transformers computes, and one that it does not."""
    root = tmp_path_factory.mktemp("checkpoints")
    models = {name: MODELS[name] for name in ("gpt2", "capped")}
    run_on_ranks(save_models, 1, models, root, tokenizer_file(root))
    return root


def outputs(settings: list[dict[str, Any]]) -> list[str]:
    """What the command prints for each setting; in a process of its own."""
    warnings.simplefilter("ignore")
    found = []
    for setting in settings:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main(GenerateConfig(**setting)) == 0
        found.append(printed.getvalue())
    return found


def both_samplers(root: Path) -> dict[str, list[str]]:
    """Greedy continuations of the same model by both samplers."""
    warnings.simplefilter("ignore")
    cfg = GenerateConfig(checkpoint=str(root / "gpt2"), temperature=0.0, max_new_tokens=12)
    prompts = ["t5 t6 t7", "t1"]
    found = {}
    with open_sampler(cfg) as sampler:
        assert isinstance(sampler, TransformersSampler)
        found["transformers"] = [sampler.sample([prompt], on_text=None)[0] for prompt in prompts]
        found["batch"] = sampler.sample(prompts, on_text=None)
    found["own"] = LocalSampler(next((root / "gpt2").glob("step-*")), cfg).sample(
        prompts, on_text=None
    )
    return found


def test_our_sampler_and_transformers_continue_alike(checkpoints: Path) -> None:
    """Greedy: with and without key/value cache, alone and left-padded in a batch."""
    found = run_on_ranks(both_samplers, 1, checkpoints)[0]
    words = {kind: [text.split() for text in texts] for kind, texts in found.items()}
    assert words["transformers"] == words["batch"] == words["own"]
    assert len(words["own"][0]) == 12


def test_command_prints_prompt_and_continuation_and_repeats_with_the_seed(
    checkpoints: Path, tmp_path: Path
) -> None:
    """One prompt is streamed; a file of prompts is sampled in batches; a seed repeats the text."""
    (tmp_path / "prompts.txt").write_text("t1 t2\nt3\n")
    gpt2 = {"checkpoint": str(checkpoints / "gpt2"), "max_new_tokens": 8}
    once, again, other, many, capped = run_on_ranks(
        outputs, 1,
        [
            {**gpt2, "prompt": "t1"}, {**gpt2, "prompt": "t1"}, {**gpt2, "prompt": "t1", "seed": 2},
            {**gpt2, "file": str(tmp_path / "prompts.txt"), "num_samples": 2, "batch_size": 3},
            {**gpt2, "checkpoint": str(checkpoints / "capped"), "prompt": "t1", "top_k": 5},
        ],
    )[0]  # fmt: skip
    assert once == again != other and once.startswith("t1") and len(once.split()) > 4
    assert [line for line in many.splitlines() if line.startswith("---")] == [
        f"--- {n}" for n in (1, 2, 3, 4)
    ]
    assert len([line for line in many.splitlines() if line.startswith("t1 t2")]) == 2
    assert capped.startswith("t1") and len(capped.split()) > 4


def test_stop_string_ends_the_text(checkpoints: Path) -> None:
    """And is not printed, streamed or not."""
    gpt2: dict[str, Any] = {
        "checkpoint": str(checkpoints / "gpt2"),
        "max_new_tokens": 12,
        "temperature": 0.0,
    }
    gpt2["prompt"] = "t5 t6"
    whole = run_on_ranks(outputs, 1, [gpt2])[0][0]
    stop = whole.split()[4]
    cut = run_on_ranks(outputs, 1, [{**gpt2, "stop": [stop]}])[0][0]
    assert cut == whole[: whole.index(stop, len(gpt2["prompt"]))] + "\n"


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_cut_text_holds_no_stop_string(text: str, stop: list[str]) -> None:
    """The longest beginning without one."""
    cut = cut_at_stop(text, stop)
    assert text.startswith(cut) and not any(end in cut for end in stop)
    assert cut == text or any(text[len(cut) :].startswith(end) for end in stop)


def test_top_k_and_top_p_leave_out_the_tail() -> None:
    """Worked by hand: probabilities 0.5, 0.3, 0.15, 0.05."""
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    torch.manual_seed(0)

    def drawn(**kwargs: Any) -> set[int]:
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **kwargs}
        return {int(choose(logits, **options)) for _ in range(200)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_p=0.5) == {1}  # the first token alone reaches one half
    assert drawn(top_p=0.51) == {1, 3}
    assert drawn(top_k=3, top_p=0.9) == {1, 3, 2}
    assert drawn(temperature=0.0) == {1}
    counts = torch.bincount(
        torch.stack([choose(logits, temperature=1.0, top_k=0, top_p=1.0) for _ in range(2000)]),
        minlength=4,
    )
    assert torch.allclose(counts / 2000, logits.exp(), atol=0.04)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    """Before anything is loaded."""
    with pytest.raises(ConfigError, match="must be at least 0"):
        main(GenerateConfig(checkpoint="nowhere", **wrong))
