"""The recipe that teaches the quickstart's model to answer, end to end, and the data it makes."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.recipe import ROOT, copy_repository, programs, run_recipe

pytest.importorskip("emoji")
pytest.importorskip("sacrebleu")
LANGUAGES = ["German", "French", "Spanish", "Italian"]
BASE_RATES = ["commonest", "copy", "shuffled"]


def script() -> Any:
    spec = importlib.util.spec_from_file_location("names", ROOT / "launch/name_dialogues.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_what_is_held_out_is_asked_for_in_no_dialogue_that_is_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in another language nor in a later turn; its relatives are learned."""
    script().main(tmp_path)
    learned, held = (
        [
            json.loads(line)["messages"]
            for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()
        ]
        for part in ("train", "held")
    )
    assert len(held) == 86 and len(learned) == 24 * 199
    assert f"{len(held)} held out" in capsys.readouterr().out
    known = {talk[1]["source"] for talk in learned}
    things = [talk[1]["source"] for talk in held]
    assert len(set(things)) == len(things) and not known & set(things)
    assert "woman surfing" in things and {"man surfing", "person surfing"} <= known
    for talk in held + learned[:100]:
        assert [message["role"] for message in talk] == ["user", "assistant"] * 4
        assert sorted(message["group"] for message in talk[1::2]) == sorted(LANGUAGES)
        assert talk[1]["source"] in talk[0]["content"]
        later = [f"And in {message['group']}?" for message in talk[3::2]]
        assert [message["content"] for message in talk[2::2]] == later  # nor is it named again
    for turn in (1, 3, 5, 7):  # no language has the easier turns
        counts = [sum(talk[turn]["group"] == language for talk in held) for language in LANGUAGES]
        assert max(counts) - min(counts) <= 3, (turn, counts)


def table(output: str) -> dict[tuple[str, str], list[float]]:
    """(group, row) to exact, F1 and chrF, of what pipeline.answer prints."""
    row = re.compile(r"^(all|[A-Z]\w+) +(\w+) +([\d.]+) +([\d.]+) +([\d.]+)$", re.MULTILINE)
    return {(m[1], m[2]): [float(m[n]) for n in (3, 4, 5)] for m in row.finditer(output)}


# Parts of the recipes' steps; docs/finetuning.md has what the whole of them reaches.
FEWER = {
    "quickstart": ("training.total_steps=200",),
    "talk": ("training.total_steps=700", "checkpoint.save_every=700"),
}


@pytest.mark.slow
def test_the_quickstarts_model_learns_to_answer(tmp_path: Path) -> None:
    """The first things a user runs. In each language exact match, F1 and chrF are above twice the best of the base rates."""
    copy_repository(tmp_path)
    check_quickstart(tmp_path)
    first = run_recipe(tmp_path, "talk", *FEWER["talk"], timeout_s=5400)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    assert programs(first.stdout) == [
        "name_dialogues.py", "data_prep.conversations", "data_prep.conversations", "data_prep.show",
        "local.sh", "pipeline.answer", "pipeline.report", "pipeline.generate",
    ]  # fmt: skip
    scores = table(first.stdout)
    assert {group for group, _ in scores} == {"all", *LANGUAGES}
    for group in ("all", *LANGUAGES):
        best = [max(values) for values in zip(*(scores[group, rate] for rate in BASE_RATES))]
        for reached, by_guessing in zip(scores[group, "model"], best, strict=True):
            assert reached > 2 * by_guessing, (group, scores)

    second = run_recipe(tmp_path, "talk", timeout_s=900)
    assert second.returncode == 0, second.stderr[-2000:]
    assert "local.sh" not in second.stdout and "conversations" not in second.stdout
    assert table(second.stdout) == scores


def check_quickstart(folder: Path) -> None:
    """It makes a GPT, refuses settings that would change nothing, and reuses what is done."""
    first = run_recipe(folder, "quickstart", *FEWER["quickstart"], timeout_s=5400)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    assert programs(first.stdout) == [
        "data_prep.train_tokenizer", "tokenize.py", "data_prep.verify", "local.sh",
        "pipeline.evaluate", "pipeline.generate", "pipeline.report",
    ]  # fmt: skip
    text = "\n".join(first.stdout.strip().splitlines()[-16:])
    words = (
        "held out", "loss", "bits per byte", "tokens/s", "curves.png", "checkpoints",
        "data/quickstart/tokens", "What to try next",
    )  # fmt: skip
    assert [word for word in words if word not in text] == [], text
    run = folder / "runs" / "quickstart"
    assert (run / "report" / "index.html").exists()
    checkpoint = (run / "checkpoints" / "latest").read_text()

    refused = run_recipe(folder, "quickstart", "optimizer.lr=1")
    assert refused.returncode == 2 and "optimizer.lr=1 would change nothing" in refused.stderr

    second = run_recipe(folder, "quickstart")
    assert second.returncode == 0, second.stderr[-2000:]
    again = programs(second.stdout)  # its last words name local.sh, for what to try next
    assert "pipeline.report" in again and not {"local.sh", "tokenize.py"} & {*again}
    assert (run / "checkpoints" / "latest").read_text() == checkpoint
