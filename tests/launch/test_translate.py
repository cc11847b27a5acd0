"""The recipe that translates names, and the pairs that it makes."""

from __future__ import annotations

import json
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import derive
from tests.launch.test_talk import BASE_RATES, table
from tests.support.recipe import copy_repository, programs, run_recipe

pytest.importorskip("emoji")
LANGUAGES = ["English", "French", "German", "Italian", "Spanish"]


def test_what_is_held_out_is_learned_in_no_language_and_direction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its relatives are; and no neighbour in a group has the same answer, which shuffling would give."""
    from launch.translations import write

    write(tmp_path)
    learned, held = (
        [
            json.loads(line)["messages"]
            for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()
        ]
        for part in ("train", "held")
    )
    ways = {f"{here} to {there}" for here, there in permutations(LANGUAGES, 2)}
    for talks, count in ((learned, 199), (held, 86)):
        asked = [talk[0]["content"].partition(": ") for talk in talks]
        assert Counter(way for way, _, _ in asked) == dict.fromkeys(ways, count)
        for (way, _, name), (_, answer) in zip(asked, talks, strict=True):
            assert answer["source"] == name and way.endswith(f" to {answer['group']}")
    pairs = {(talk[0]["content"], talk[1]["content"]) for talk in learned}
    assert not pairs & {(talk[0]["content"], talk[1]["content"]) for talk in held}
    english = [
        {talk[1]["content"] for talk in talks if talk[1]["group"] == "English"}
        for talks in (learned, held)
    ]
    assert not english[0] & english[1]
    assert "woman surfing" in english[1] and {"man surfing", "person surfing"} <= english[0]
    for language in LANGUAGES:
        answers = [talk[1]["content"] for talk in held if talk[1]["group"] == language]
        assert all(a != b for a, b in zip(answers, answers[1:]))
    text = (tmp_path / "names.txt").read_text()
    assert "man surfing\n" in text.lower() and "woman surfing\n" not in text
    assert "86 held out" in capsys.readouterr().out


def test_the_preset_fits_the_rows_that_the_recipe_makes() -> None:
    """A row is a sequence, and the vocabulary its tokenizer's."""
    words = ["experiment=translate", "parallel.tensor_parallel_size=2"]
    cfg = cli.compose(PretrainConfig, words, config="pretrain")
    assert cfg.data.train[0].path == "data/translate/train/train"
    assert derive(cfg, world_size=2, tokenizer_vocab_size=1024).seq_len == 256


@pytest.mark.slow
def test_a_model_learns_to_translate_from_scratch(tmp_path: Path) -> None:
    """A part of the recipe's steps; docs/finetuning.md has what the whole of it reaches."""
    pytest.importorskip("sacrebleu")
    copy_repository(tmp_path)
    words = ("training.total_steps=600", "training.eval_every=300", "checkpoint.save_every=600")
    done = run_recipe(tmp_path, "translate", *words, timeout_s=5400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert programs(done.stdout) == [
        "launch.translations", "data_prep.train_tokenizer", "data_prep.conversations", "data_prep.conversations",
        "data_prep.show", "local.sh", "pipeline.answer", "launch.translations", "pipeline.report", "pipeline.generate",
    ]  # fmt: skip
    scores = table(done.stdout)
    assert {group for group, _ in scores} == {"all", *LANGUAGES}
    best = [max(values) for values in zip(*(scores["all", rate] for rate in BASE_RATES))]
    for reached, by_guessing in zip(scores["all", "model"], best, strict=True):
        assert reached > 2 * by_guessing, scores

    second = run_recipe(tmp_path, "translate", timeout_s=900)
    assert second.returncode == 0, second.stderr[-2000:]
    assert "local.sh" not in second.stdout and table(second.stdout) == scores
