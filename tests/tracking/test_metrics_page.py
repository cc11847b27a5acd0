"""docs/watching.md says what stands in metrics.jsonl, and nothing else does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

from pipeline.tracking.history import HEADS
from pipeline.tracking.planned import Planned
from tests.tracking.test_metrics import State, make, rows, train

ROOT = Path(__file__).resolve().parents[2]


def documented_names() -> set[str]:
    """What the page says stands in metrics.jsonl: the first column of its tables."""
    page = (ROOT / "docs" / "watching.md").read_text().split("## metrics.jsonl")[1]
    return set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))


def names_of(row: dict) -> set[str]:
    """Of a row, as the page writes them."""
    names = {re.sub("^val/.*/", "val/DATASET/", name) for name in row}
    names = {re.sub(r"^lens/loss_\d+$", "lens/loss_N", name) for name in names}
    return {re.sub(r"^goodput/lost_\w+_s$", "goodput/lost_PHASE_s", name) for name in names}


def test_the_page_names_what_is_written_and_nothing_else(tmp_path):
    """Whoever reads metrics.jsonl with a program reads the page first. A whole run: test_trainer.py."""
    tracker, state = make(tmp_path), State()
    tracker.goodput.clock.enter("end", 0)
    train(tracker, state, 1)
    result = SimpleNamespace(loss=2.0, ppl=7.4, bits_per_byte=0.9, tokens=10, exact=40.0)
    tracker.record_eval(state, {"wiki": result})
    tracker.close()
    written = set().union(*map(names_of, rows(tmp_path)))
    written |= {f"plan/{field.name}" for field in dataclasses.fields(Planned)}
    written |= {f"probe/{name}" for name in HEADS}
    lens = (ROOT / "pipeline" / "probing" / "while_training.py").read_text()
    written |= {
        name.replace("{number}", "N") for name in re.findall(r'f"(lens/\w+_{number})"', lens)
    }
    for source, pattern in {
        "training/trainer.py": r'"(resilience/\w+)"', "resilience/stragglers.py": r'"(resilience/\w+)"',
        "training/step_extras.py": r'"(data/\w+)"', "tracking/routing.py": r'"(moe/\w+)":',
    }.items():  # fmt: skip
        found = re.findall(pattern, (ROOT / "pipeline" / source).read_text())
        assert found, source
        written.update(found)
    guard = (ROOT / "pipeline" / "resilience" / "guard.py").read_text()
    written |= {f"resilience/{kind}" for kind in re.findall(r'\(summary, "(\w+)"', guard)}
    assert documented_names() == written
