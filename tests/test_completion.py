"""What a shell offers: commands, settings, presets, values, as bash itself asks for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import completion
from pipeline.config.pretrain import PretrainConfig
from tests.support.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {"model": ["tiny", "gpt2-124m", "gpt2-355m"], "optimizer": ["adamw"]}


@pytest.mark.parametrize(
    "word, expected",
    [
        ("model=gpt2", ["model=gpt2-124m", "model=gpt2-355m"]),
        ("optimizer.weight_d", ["optimizer.weight_decay="]),
        ("training.prec", ["training.precision="]),
        ("training.precision=f", ["training.precision=fp32", "training.precision=fp16"]),
        ("model.bias=", ["model.bias=true", "model.bias=false"]),
        ("data.path=", []),
        ("qqq", []),
    ],
)  # fmt: skip
def test_a_word_becomes_settings_presets_and_values(word: str, expected: list[str]) -> None:
    """Nothing for a path: the shell offers files itself."""
    assert sorted(completion.offered(word, PretrainConfig, GROUPS)) == sorted(expected)


def test_a_section_that_is_a_group_is_offered_once() -> None:
    found = [*completion.offered("optimizer", PretrainConfig, GROUPS)]
    assert found[0] == "optimizer=" and len(found) == len(set(found))


def test_bash_completes_a_line(tmp_path: Path) -> None:
    """The script that `pretrain completion` prints, in bash; `=` breaks words there."""
    (tmp_path / "pretrain").write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m pipeline.pretrain "$@"\n'
    )
    (tmp_path / "pretrain").chmod(0o755)
    script = f"PATH={tmp_path}:$PATH\n" + 'eval "$(pretrain completion)"\n'
    lines = {"pretrain tok": ["tokenize"], "pretrain train experiment=your": ["your-text"],
             "pretrain chat temp": ["temperature="], "pretrain train model=tiny schedule=c": ["constant", "cosine"]}  # fmt: skip
    for line in lines:
        script += f"COMP_LINE='{line}' COMP_POINT={len(line)}; _pretrain 2> /dev/null\n"
        script += 'echo "${COMPREPLY[@]}"\n'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=HANG_S)
    assert [sorted(found.split()) for found in done.stdout.splitlines()] == list(lines.values())
