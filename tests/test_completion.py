"""What a shell offers: commands, settings, presets, values, as bash, zsh and fish ask for them."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import completion, pretrain
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


LINES = {
    "pretrain tok": ["tokenize"], "pretrain train experiment=your": ["your-text"],
    "pretrain chat temp": ["temperature="],
    "pretrain train model=tiny schedule=c": ["constant", "cosine"],
}  # fmt: skip
"""What is typed, and what Tab offers of it; behind `=` the values alone where the shell cuts there."""


@pytest.fixture
def door(tmp_path: Path) -> str:
    """PATH on which `pretrain` is this tree's."""
    (tmp_path / "pretrain").write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m pipeline.pretrain "$@"\n'
    )
    (tmp_path / "pretrain").chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def lines_of(shell: str, script: str, door: str) -> list[str]:
    """What a script of a shell prints."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run(
        [shell, "-c", script], capture_output=True, text=True, timeout=HANG_S,
        env={**os.environ, "PATH": door},
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_bash_completes_a_line(door: str) -> None:
    """The script that `pretrain completion` prints, in bash; `=` breaks words there."""
    script = 'eval "$(pretrain completion)"\n'
    for line in LINES:
        script += f"COMP_LINE='{line}' COMP_POINT={len(line)}; _pretrain 2> /dev/null\n"
        script += 'echo "${COMPREPLY[@]}"\n'
    found = [sorted(line.split()) for line in lines_of("bash", script, door)]
    assert found == [*LINES.values()]


def test_fish_completes_a_line_and_files_where_the_program_knows_nothing(
    door: str, tmp_path: Path
) -> None:
    """As its Tab does: `complete -C` is what the key calls."""
    script = "pretrain completion fish | source\n"
    lines = [*LINES][:2]
    for line in lines:
        script += f"complete -C '{line}' | string join ' '\n"
    (tmp_path / "corpus").mkdir()
    script += f"complete -C 'pretrain train data.path={tmp_path}/cor'\n"
    *found, path = lines_of("fish", script, door)
    ends = [sorted(word.rpartition("=")[2] or word for word in line.split()) for line in found]
    assert ends == [LINES[line] for line in lines]
    assert path.split("\t")[0].endswith("corpus/")


def test_zsh_completes_a_line_and_files_where_the_program_knows_nothing(
    door: str, tmp_path: Path
) -> None:
    """With the key itself, in a terminal; Ctrl-U takes the line away for the next one."""
    (zsh := shutil.which("zsh")) or pytest.skip("zsh is not installed")
    (tmp_path / "corpus").mkdir()
    typed = {
        "pretrain tok": "pretrain tokenize ",
        "pretrain chat temp": "erature=",
        f"pretrain train data.path={tmp_path}/cor": f"{tmp_path}/corpus/",
    }
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [zsh, "-f", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "PATH": door, "TERM": "dumb", "COLUMNS": "500", "HOME": str(tmp_path)},
    )  # fmt: skip
    try:
        os.write(ours, b'eval "$(pretrain completion zsh)"; echo rea""dy\n')
        wait_for(ours, "ready\r\n")
        for line, whole in typed.items():
            os.write(ours, f"{line}\t".encode())
            wait_for(ours, whole)
            os.write(ours, b"\x15")
    finally:
        process.kill()
        process.wait()
        os.close(ours), os.close(theirs)


def wait_for(terminal: int, text: str) -> None:
    """Read until a terminal shows a text."""
    seen, end = "", time.monotonic() + HANG_S
    while text not in seen:
        assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], seen
        seen += os.read(terminal, 4096).decode()


def test_a_shell_that_cannot_is_told_which_can(monkeypatch, capsys) -> None:
    """Not bash's script for whoever has another one."""
    monkeypatch.setattr(sys, "argv", ["pretrain", "completion", "tcsh"])
    with pytest.raises(SystemExit) as end:
        pretrain.main()
    assert end.value.code == 2 and "bash, zsh, fish can" in capsys.readouterr().err
