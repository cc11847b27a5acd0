"""Benchmarks start as files, beside one that is called tokenize.py, and the ladder climbs its smallest rung."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.name for path in (ROOT / "benchmarks").glob("[a-z]*.py"))


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", FILES)
def test_help_of_every_benchmark(name: str) -> None:
    assert len(run(f"benchmarks/{name}", "--help").splitlines()) > 5


def test_the_ladder_measures_its_smallest_rung() -> None:
    row = run("benchmarks/gpu_ladder.py", "--rungs", "tiny", "--steps", "2").splitlines()[-1]
    name, parameters, tokens_per_s, *_ = (cell.strip() for cell in row.strip("|").split("|"))
    assert (
        name == "tiny"
        and int(parameters.replace(",", "")) > 500_000
        and float(tokens_per_s.replace(",", "")) > 0
    )
