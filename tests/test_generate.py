"""The generate command: prints prompts and continuations, repeats with the seed, stops."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.generate import GenerateConfig, main
from tests.support.exported import save_models, tokenizer_file
from tests.support.layouts import MODELS
from tests.support.ranks import run_on_ranks


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


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": -1},
        {"num_samples": 0}, {"batch_size": 0}, {"max_new_tokens": 0},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    """Before anything is loaded."""
    with pytest.raises(ConfigError, match="must be at least [01]"):
        main(GenerateConfig(checkpoint="nowhere", **wrong))
