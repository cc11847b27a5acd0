"""The quickstart, end to end in a folder of its own, with fewer and smaller steps."""

from __future__ import annotations

import pytest

from tests.support.recipe import copy_repository, programs, run_recipe

SMALL = [
    "training.total_steps=4",
    "schedule.warmup_steps=1",
    "training.eval_every=2",
    "training.eval_sequences=8",
]


@pytest.mark.slow
def test_quickstart_makes_a_gpt_and_reuses_it(tmp_path):
    """The first thing a user runs; the second run must not train again."""
    copy_repository(tmp_path)
    first = run_recipe(tmp_path, "quickstart", *SMALL)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    assert programs(first.stdout) == [
        "data_prep.train_tokenizer", "tokenize.py", "data_prep.verify", "local.sh",
        "pipeline.evaluate", "pipeline.generate", "pipeline.report",
    ]  # fmt: skip
    last_lines = first.stdout.strip().splitlines()[-16:]
    text = "\n".join(last_lines)
    words = (
        "held out",
        "loss",
        "bits per byte",
        "tokens/s",
        "curves.png",
        "checkpoints",
        "data/quickstart/tokens",
        "What to try next",
    )
    assert [word for word in words if word not in text] == [], text
    run = tmp_path / "runs" / "quickstart"
    assert (run / "report" / "index.html").exists()
    checkpoint = (run / "checkpoints" / "latest").read_text()

    refused = run_recipe(tmp_path, "quickstart", "optimizer.lr=1")
    assert refused.returncode == 2 and "optimizer.lr=1 would change nothing" in refused.stderr

    second = run_recipe(tmp_path, "quickstart")
    assert second.returncode == 0, second.stderr[-2000:]
    again = programs(second.stdout)  # its last words name local.sh, for what to try next
    assert "pipeline.report" in again and not {"local.sh", "tokenize.py"} & {*again}
    assert (run / "checkpoints" / "latest").read_text() == checkpoint
