"""The generate command: prints prompts and continuations, repeats with the seed, stops."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from pipeline.generate import GenerateConfig, main
from tests.support.exported import save_models, tokenizer_file
from tests.support.layouts import MODELS
from tests.support.ranks import run_on_ranks

ROOT = Path(__file__).resolve().parents[1]


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


HEAVY = ("transformers", "megatron", "deepspeed", "wandb", "torch._dynamo", "torch.distributed.checkpoint")  # fmt: skip
ASKED = """
import sys
from pipeline.generate import GenerateConfig, main
assert main(GenerateConfig(checkpoint=sys.argv[1], prompt="t1", max_new_tokens=4)) == 0
print(*(name for name in sys.argv[2:] if name in sys.modules), file=sys.stderr)
"""


def test_a_checkpoint_is_sampled_with_torch_alone(checkpoints: Path) -> None:
    """Their imports were 4 of 7 seconds of CPU; the text of a small model takes a tenth of one."""
    command = [sys.executable, "-c", ASKED, str(checkpoints / "gpt2"), *HEAVY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("t1"), done.stderr
    assert done.stderr.splitlines()[-1] == "", "imported without need"
