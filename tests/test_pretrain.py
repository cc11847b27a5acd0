"""The front door: every command by one name, the way out of a wrong one, and an installation without the clone."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import pretrain
from tests.support.corpus import make_texts
from tests.support.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[1]


def door(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pipeline.pretrain", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=HANG_S)


def test_every_command_of_both_packages_has_a_name():
    """A command that is missing at the front door does not exist for who installed a wheel."""
    files = [*ROOT.glob("pipeline/*.py"), *ROOT.glob("pipeline/*/__main__.py"), *ROOT.glob("data_prep/*.py")]  # fmt: skip
    runnable = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in files
        if '__name__ == "__main__"' in path.read_text()
    }
    assert {module for module, *_ in pretrain.COMMANDS.values()} == runnable - {"pipeline.pretrain"}


def test_the_page_has_a_sentence_for_each_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    with pytest.raises(SystemExit) as end:
        pretrain.main()
    lines = capsys.readouterr().out.split("Commands:\n")[1].splitlines()
    assert end.value.code == 0
    assert [line.split()[0] for line in lines if line[2] != " "] == [*pretrain.COMMANDS]
    assert all(len(line) <= 78 for line in lines)
    assert sum(line.endswith((".", "?")) for line in lines) == len(pretrain.COMMANDS)


@pytest.mark.parametrize(
    "word, part",
    [("tarin", "Did you mean train?"), ("sample", "Did you mean generate?"), ("eval", "evaluate?"),
     ("model=tiny", "pretrain train key=value"), ("qqq", "Commands: train-tokenizer, clean")],
)  # fmt: skip
def test_a_wrong_command_is_named_with_the_way_out(word, part, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain", word])
    with pytest.raises(SystemExit) as end:
        pretrain.main()
    assert end.value.code == 2 and part in capsys.readouterr().err


def test_a_command_is_told_its_words_and_its_exit_code_is_the_doors():
    """It is the module, as `python -m` runs it."""
    done = door("hf_import", "nowhere", "fodler=x")
    assert done.returncode == 2 and "Did you mean folder?" in done.stderr


@pytest.mark.parametrize("word", ["--help", "completion"])
def test_a_full_output_is_a_sentence(word):
    """As of every command; the page of the door was printed outside of what says so."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "pipeline.pretrain", word]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: the output: No space left")


def five_commands() -> list[list[str]]:
    """Of docs/your-text.md, word by word."""
    page = (ROOT / "docs" / "your-text.md").read_text()
    block = page.split("```")[1]
    return [shlex.split(line)[1:] for line in block.strip().splitlines()]


def test_the_page_has_five_commands_of_the_front_door():
    names = [words[0] for words in five_commands()]
    assert names == ["train-tokenizer", "tokenize", "train", "generate", "export"]


def installed(folder: Path) -> Path:
    """Where a wheel of this tree is installed, without the clone."""
    source, site = folder / "source", folder / "site"
    source.mkdir()
    names = ["pipeline", "data_prep", "conf", "pyproject.toml", "README.md", "LICENSE"]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    alone = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *alone, "--no-build-isolation", "-w", str(folder), str(source)], check=True)  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *alone, "--target", str(site), str(wheel)], check=True)
    return site


@pytest.mark.slow
def test_an_installed_wheel_makes_a_model_of_ones_own_text_from_an_empty_folder(tmp_path):
    """The five commands of the page; presets and templates are in the wheel, nothing needs the clone."""
    site, empty = installed(tmp_path), tmp_path / "empty"
    empty.mkdir()
    (empty / "text.txt").write_text("\n\n".join(make_texts(300)))
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    shown = {}
    small = {"train": ["training.total_steps=4", "schedule.warmup_steps=null", "training.eval_every=2"],
             "generate": ["max_new_tokens=4"]}  # fmt: skip
    for words in five_commands():
        command = [sys.executable, str(site / "bin" / "pretrain"), *words, *small.get(words[0], [])]
        if words[0] == "generate":
            command.remove("max_new_tokens=200")
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stderr[-2000:]}"
        shown[words[0]] = done.stdout + done.stderr
    assert "done at step 4 of 4" in shown["train"] and "is the best so far" in shown["train"]
    assert shown["generate"].count("Once upon a time") == 1
    assert (empty / "my" / "exported" / "model.safetensors").exists()
    templates = {path.name for path in (site / "data_prep" / "chat").iterdir()}
    assert {"chatml.jinja", "plain.jinja"} <= templates
    assert (site / "pipeline" / "inference" / "talk.html").exists()
