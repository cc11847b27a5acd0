"""docs/pictures.md: what it says of the recipe for a cluster is what the plan and a rehearsed rank of it say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.plan import PlanConfig, main
from pipeline.rehearsal import fake_cuda

PAGE = " ".join((Path(__file__).resolve().parents[2] / "docs/pictures.md").read_text().split())
RECIPE = ["experiment=pictures-1.3b", "world_size=64", "device=h100"]


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(cli.compose(PlanConfig, [*RECIPE, *words], config="pretrain"))
    return capsys.readouterr().out


def numbers(pattern: str, text: str) -> tuple[str, ...]:
    found = re.search(pattern, text)
    assert found, pattern
    return found.groups()


def test_the_page_says_what_the_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    """A number that was copied once is wrong as soon as the plan learns something."""
    out = plan(capsys)
    assert "{} in all".format(*numbers(r"([\d,]+) parameters", out)) in PAGE
    (most,) = numbers(r"h100 has ([\d.]+) GiB: it fits", out)
    (needed,) = numbers(r"it fits \(stage 0, ([\d.]+) GiB", out)
    step = numbers(r"a step takes ([\d.]+) s; real runs ([\d.]+) to ([\d.]+) s", out)
    (share,) = numbers(r"by the formula ([\d.]+)%", out)
    assert f"{needed} GiB of {most} on a device" in PAGE
    assert "{} s a step of 1 M tokens by the formula ({} to {})".format(*step) in PAGE
    assert f"MFU {float(share):.0f} %" in PAGE


@pytest.mark.slow
@pytest.mark.skipif(fake_cuda.compiler() is None, reason="no C++ compiler")
def test_the_page_says_what_a_rehearsed_rank_of_64_does(capsys: pytest.CaptureFixture[str]) -> None:
    """All of its 1.4 B parameters on a device that computes nothing: memory, what it reads back, what it sends."""
    out = plan(capsys, "dry_run=true", "rank=0")
    assert "rehearsed rank 0 (data 0, pipeline 0, tensor 0): all on cuda:0" in out
    held = numbers(r"([\d.]+) GiB of tensors at its peak, ([\d.]+) planned", out)
    assert "{} GiB of tensors, {} planned".format(*held) in PAGE
    assert "reads 0 numbers back in a step" in out and "reads nothing back" in PAGE
    sent = re.findall(r" (\w+) of \w+ over data: ([\d.]+) GiB", out)
    large = [f"{float(gib):.2f} GiB" for _, gib in sent if float(gib) > 0.1]
    assert large and all(one in PAGE for one in large), out
