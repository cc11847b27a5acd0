"""The front door: every command by one name, the way out of a wrong one, and an installation without the clone."""

from __future__ import annotations

import os
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
    assert end.value.code == 0 and len(lines) == len(pretrain.COMMANDS)
    assert all(line[19:].endswith((".", "?")) and len(line) <= 120 for line in lines), lines


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


@pytest.mark.slow
def test_an_installed_wheel_trains_from_an_empty_folder(tmp_path):
    """Presets and chat templates are in the wheel, and nothing needs the clone."""
    build, site, empty = tmp_path / "wheel", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    source = tmp_path / "source"
    names = ["pipeline", "data_prep", "conf", "pyproject.toml", "README.md", "LICENSE"]
    source.mkdir()
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "-w", str(build), str(source)], check=True)
    (wheel,) = build.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)  # fmt: skip
    (empty / "text.txt").write_text("\n\n".join(make_texts(300)))
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def pretrain_(*words: str) -> str:
        command = [sys.executable, str(site / "bin" / "pretrain"), *words]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=HANG_S)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout + done.stderr

    assert "  model.num_layers = 12\n" in pretrain_("train", "--help", "model=modern-125m")
    pretrain_("train-tokenizer", "text.txt", "t.json", "vocab_size=300")
    pretrain_("tokenize", "text.txt", "data", "tokenizer=t.json", "validation_fraction=0.1")
    shown = pretrain_(
        "train", "model=tiny", "model.num_layers=1", "data.path=data", "training.total_steps=2",
        "training.seq_len=32", "training.global_batch_size=4", "training.precision=fp32",
        "tracking=local", "schedule.min_lr=0",
    )  # fmt: skip
    assert "done at step 2 of 2" in shown
    assert (empty / "runs" / "tiny" / "DONE").exists()
    templates = {path.name for path in (site / "data_prep" / "chat").iterdir()}
    assert {"chatml.jinja", "plain.jinja"} <= templates
