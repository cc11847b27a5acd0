"""The quickstart, end to end in a folder of its own, with fewer and smaller steps."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "training.total_steps=4",
    "schedule.warmup_steps=1",
    "training.eval_every=2",
    "training.eval_sequences=8",
]


def quickstart(folder: Path, *settings: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    command = [folder / "launch" / "quickstart.sh", *SMALL, *settings]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_quickstart_makes_a_gpt_and_reuses_it(tmp_path):
    """The first thing a user runs; the second run must not train again."""
    for name in ("conf", "data_prep", "launch", "pipeline"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    first = quickstart(tmp_path)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    commands = re.findall(r"^\$ (.+)", first.stdout, re.MULTILINE)
    modules = [re.search(r"(?:-m |data_prep/|launch/)([\w.]+)", command)[1] for command in commands]
    assert modules == [
        "data_prep.train_tokenizer", "tokenize.py", "data_prep.verify", "local.sh",
        "pipeline.evaluate", "pipeline.generate", "pipeline.report",
    ]  # fmt: skip
    last_lines = first.stdout.strip().splitlines()[-9:]
    text = "\n".join(last_lines)
    words = (
        "held out",
        "loss",
        "bits per byte",
        "tokens/s",
        "curves.png",
        "checkpoints",
        "data/quickstart/tokens",
    )
    assert [word for word in words if word not in text] == [], text
    run = tmp_path / "runs" / "quickstart"
    assert (run / "report" / "index.html").exists()
    checkpoint = (run / "checkpoints" / "latest").read_text()

    second = quickstart(tmp_path)
    assert second.returncode == 0, second.stderr[-2000:]
    assert "local.sh" not in second.stdout
    assert "tokenize.py" not in second.stdout
    assert (run / "checkpoints" / "latest").read_text() == checkpoint
