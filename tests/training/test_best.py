"""The best checkpoint of a run stays, whatever is pruned, and can be asked for by its name."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.checkpoint import folder as folders
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import CheckpointError
from pipeline.training.best import mean_loss
from tests.support.ranks import run_on_ranks
from tests.support.records import write_record
from tests.support.small_runs import overrides, train_on_ranks, validation, write_data
from tests.support.token_dataset import write_dataset


def test_the_checkpoint_with_the_lowest_held_out_loss_is_kept(tmp_path: Path) -> None:
    """What is held out is never trained on here: the better the model knows the rest, the worse it does."""
    data = write_data(tmp_path / "data")
    unknown = np.random.default_rng(1).integers(300, 400, 4_000)
    tokenizer = Tokenizer.from_file(data / "tokenizer.json")
    write_dataset(
        data / "validation", [unknown], block_tokens=16384, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.raw
    )  # fmt: skip
    settings = {
        "training.total_steps": 8, "training.eval_every": 2, "checkpoint.save_every": 0,
        "checkpoint.keep_last": 1, "checkpoint.keep_best": "true", "optimizer.lr": 0.01,
    }  # fmt: skip
    run_on_ranks(train_on_ranks, 1, overrides(data, tmp_path / "runs", **settings))
    found, root = validation(tmp_path / "runs" / "run"), tmp_path / "runs" / "run" / "checkpoints"
    best = min(found, key=lambda step: found[step])
    assert list(found) == [2, 4, 6, 8] and best < 8
    assert folders.find(root / "best") == root / folders.name_of(best)
    assert [step for step, _ in folders.list_checkpoints(root)] == [best, 8]
    assert folders.best_loss([root]) == found[best]


def test_best_is_one_over_all_places_and_gone_with_its_checkpoint(tmp_path: Path) -> None:
    """A fallback folder has checkpoints too; an old name there would keep another one for ever."""
    places = [tmp_path / "a", tmp_path / "b"]
    assert folders.best_loss(places) is None
    for place, step in zip(places, (3, 7)):
        (place / folders.name_of(step)).mkdir(parents=True)
        write_record(place / folders.name_of(step), "{}")
    folders.mark_best(places, 3, 2.5)
    folders.mark_best(places, 7, 2.0)
    assert not (places[0] / "best").exists() and folders.best_loss(places) == 2.0
    folders.remove(places[1] / folders.name_of(7))
    assert folders.best_loss(places) is None
    with pytest.raises(CheckpointError, match="best names .*step-00000007, which is no checkpoint"):
        folders.find(places[1] / "best")


def test_datasets_count_alike_and_nothing_is_no_best() -> None:
    results = {"a": SimpleNamespace(loss=1.0), "b": SimpleNamespace(loss=2.0)}
    assert mean_loss(results) == 1.5  # type: ignore[arg-type]
    assert math.isnan(mean_loss({}))
