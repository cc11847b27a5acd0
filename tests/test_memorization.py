"""What a run has read is found in its model, and what it has not read is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_prep.tokens.tokenize_job import TokenizeConfig
from data_prep.tokens.tokenize_job import main as tokenize
from pipeline import cli
from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.record import read_record
from pipeline.checkpoint.seen import Seen
from pipeline.data.canary_list import CANARIES, read_list
from pipeline.data.reader import Reader
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import memorization_file
from pipeline.evaluation.attacks import chance_exposure
from pipeline.evaluation.memorization import Audit, canaries_exposed
from pipeline.huggingface.card_facts import privacy_facts
from pipeline.inference.asked_model import tokenizer_of
from pipeline.inference.known_windows import known_windows
from pipeline.memorization import MemorizationConfig, _canaries, main, print_findings
from tests.support.corpus import make_tokenizer, write_jsonl
from tests.support.ranks import run_on_ranks
from tests.support.small_runs import history, overrides, train_on_ranks, write_data

WORDS = (
    "amber brick cedar delta ember fjord grain hazel ivory jolly karma lemon mango noble ocean "
    "pearl quartz river sugar tiger ultra vivid wheat xenon yacht zebra"
).split()


def corpus(folder: Path, count: int) -> Path:
    """Sentences of random words: nothing to learn but the words, so that what is known was read."""
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, random.integers(20, 60))) for _ in range(count)]
    return write_jsonl(folder / "corpus.jsonl", texts)


def run(folder: Path, *, documents: int, canaries: Sequence[str], **settings: Any) -> Path:
    """A run over a corpus with canaries."""
    make_tokenizer(folder / "tokenizer.json")
    words = [f"input={corpus(folder, documents)}", f"output={folder}/out", "workers=1",
             f"tokenizer={folder}/tokenizer.json", "encoder=hf", "validation_fraction=0.15",
             *canaries]  # fmt: skip
    tokenize(cli.compose(TokenizeConfig, words, config="tokenize"))
    run_on_ranks(train_on_ranks, 1, overrides(folder / "out", folder / "runs", **settings))
    return folder / "runs/run"


def exposures(run: Path) -> dict[int, float]:
    """Repetitions to the mean exposure of canaries among 63 references: 6 bits at most, 1.38 by chance."""
    from pipeline.huggingface.whole_model import open_model
    from pipeline.model.local_model import LocalModel

    folder = folders.find(run)
    record, tokenizer = read_record(folder), tokenizer_of(folder)
    template, canaries = read_list(run.parent.parent / "out/canaries.json")
    tensors = open_model(folder)
    model = LocalModel(record.model(), lambda name: tensors.tensor(f"weights/{name}"))
    found = canaries_exposed(
        model, template, canaries,
        encode=tokenizer.encode, eod=tokenizer.eod, references=63, audit=Audit(rows=64, seed=0),
    )  # fmt: skip
    return {int(count): row["value"] for count, row in found["repetitions"].items()}


def measured(run: Path, **settings: Any) -> dict[str, Any]:
    assert main(MemorizationConfig(str(run), **settings)) == 0
    found = memorization_file.read(memorization_file.place_of(folders.find(run)))
    assert found is not None
    return found


@pytest.mark.slow
def test_an_overtrained_model_gives_away_what_was_repeated_and_nothing_that_was_not_planted(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """64 repetitions: nearly the most there is; never planted: near chance; read windows are told apart."""
    canaries = ["canaries.each=6", "canaries.repetitions=[1,64]"]
    folder = run(tmp_path, documents=150, canaries=canaries, **{
        "training.total_steps": 400, "training.eval_every": 0, "checkpoint.save_every": 400,
        "optimizer.lr": 3e-3, "model.num_layers": 2, "model.hidden_size": 128,
        "training.global_batch_size": 16, "training.micro_batch_size": 16,
    })  # fmt: skip
    found = measured(folder, references=255, prefixes=[8, 16], continuation=16, windows=64)
    by_count, chance = found["canaries"]["repetitions"], found["canaries"]["chance"]
    assert found["canaries"]["most"] == 8.0
    assert by_count["64"]["value"] > 7.5
    # The mean of six has a standard deviation of 1.44 / sqrt 6 = 0.59 by chance.
    assert abs(by_count["0"]["value"] - chance) < 1.8
    assert by_count["0"]["value"] < by_count["64"]["value"] - 3
    assert found["membership"]["loss"]["auc"]["low"] > 0.6
    rates = found["extraction"][-1]
    assert rates["read"]["exact"]["value"] > rates["held_out"]["exact"]["value"]
    printed = capsys.readouterr().out
    assert "planted 64 times" in printed and "never planted" in printed
    card = privacy_facts(read_record(folders.find(folder)), folders.find(folder))["Memorization"]
    assert "planted 64 times" in card and "(chance 1.4, most 8.0)" in card


@pytest.mark.slow
def test_what_is_in_the_data_once_is_learned_without_noise_and_not_with_it(tmp_path: Path) -> None:
    """Sixteen canaries, 69 epochs: 4.2 of 6 bits. At epsilon 7.3 it is 1.1, as of those that were never planted."""
    pytest.importorskip("opacus")
    settings = {
        "training.total_steps": 200, "training.eval_every": 0, "checkpoint.save_every": 200,
        "optimizer.lr": 5e-3, "model.num_layers": 2, "model.position": "rope", "data.mask_documents": "true",
        "training.global_batch_size": 16, "training.micro_batch_size": 16, "schedule.warmup_steps": 5,
    }  # fmt: skip
    noise = {"finetune.dp.clip_norm": 0.5, "finetune.dp.noise_multiplier": 4.0, "finetune.dp.delta": 0.01, "optimizer.clip_grad": 0.0}  # fmt: skip
    canaries = ["canaries.each=16", "canaries.repetitions=[1]"]
    plain, private = (
        run(tmp_path / name, documents=16, canaries=canaries, **settings, **more)
        for name, more in [("plain", {}), ("private", noise)]
    )
    record = read_record(folders.find(private))
    assert record.privacy is not None and record.privacy["reads"] > 50
    assert record.privacy["delta"] < record.privacy["reads"] / record.state["samples_seen"]  # 1 / n
    assert record.privacy["epsilon"] < 8
    # The mean of sixteen has a standard deviation of 1.44 / sqrt 16 = 0.36 by chance. Four of them:
    # the noise has no seed, so that no two runs of this test are alike.
    chance, spread = chance_exposure(63), 1.44
    known, hidden = exposures(plain), exposures(private)
    assert known[1] > 3 and abs(known[0] - chance) < spread
    assert abs(hidden[1] - chance) < spread and abs(hidden[0] - chance) < spread
    losses = history(private)  # it has learned of the text what they all have in common
    assert losses[1][0] > 5.9 and losses[200][0] < 4.8

    key = (private / "dp_noise.key").read_bytes()
    kept = [p for p in (private / "checkpoints").rglob("*") if p.is_file()]
    assert not [path for path in kept if key in path.read_bytes()]
    assert record.guard["history"] == []
    card = privacy_facts(record, folders.find(private))
    assert card["Differential privacy"].startswith(f"epsilon {record.privacy['epsilon']:.2f} at delta 0.01 for one sequence of 64 tokens")  # fmt: skip
    assert card["Personal data in the training text"] == "not looked for"


def test_of_several_lists_of_canaries_one_is_to_be_named(tmp_path: Path) -> None:
    """The first was measured, and nobody was told of the others."""

    def seen(*names: str) -> Any:
        folders = [SimpleNamespace(local=tmp_path / name / "train") for name in names]
        datasets = [SimpleNamespace(folder=folder, is_remote=False) for folder in folders]
        return SimpleNamespace(sampler=SimpleNamespace(datasets=datasets))

    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / CANARIES).write_text("{}")
    cfg = MemorizationConfig("run")
    assert _canaries(cfg, seen("a", "none", "a")) == tmp_path / "a" / CANARIES
    assert _canaries(cfg, seen("none")) is None
    with pytest.raises(ConfigError, match="set canaries= to one of"):
        _canaries(cfg, seen("a", "b"))
    assert _canaries(MemorizationConfig("run", canaries="c"), seen("a", "b")) == Path("c")


def test_windows_read_are_those_of_the_order_and_held_out_ones_are_others(tmp_path: Path) -> None:
    """Ten steps of a small run: every window that is called read was in one of their batches."""
    data = write_data(tmp_path / "data")
    settings = {"training.eval_every": 0, "checkpoint.save_every": 10, "model.num_layers": 1}
    run_on_ranks(train_on_ranks, 1, overrides(data, tmp_path / "runs", **settings))
    folder = folders.find(tmp_path / "runs/run")
    record = read_record(folder)
    seen = Seen(record)
    numbers = np.arange(seen.num_samples)
    assert seen.num_samples == 80 and seen.sampler.most_reads(seen.position) == 1
    source, shard, sequence = seen.places(numbers)
    firsts = seen.firsts(0)
    by_piece = np.concatenate([windows for _, windows in seen.windows(0)])
    np.testing.assert_array_equal(by_piece, firsts[shard] + sequence)
    ids = Reader(seen.sampler.datasets, seq_len=64).gather(source, shard, sequence).ids
    read = {row.tobytes() for row in ids.astype(np.int64)}
    found = known_windows(record, seen, count=60, seed=1)
    assert found["read"].shape == (60, 65) and found["held_out"].shape == (60, 65)
    chosen = {row.tobytes() for row in found["read"].numpy()}
    assert len(chosen) > 50 and chosen <= read
    assert not {row.tobytes() for row in found["held_out"].numpy()} & read
    with pytest.raises(ConfigError, match="20 windows of 64 tokens for 'read'"):
        known_windows(record, seen, count=20, seed=1)

    findings = measured(tmp_path / "runs/run", windows=60, prefixes=[8, 4], continuation=8)
    assert findings["canaries"] is None and findings["step"] == 10
    assert [row["prefix"] for row in findings["extraction"]] == [4, 8]
    assert findings["windows"] == {"read": 60, "held_out": 60}
    assert privacy_facts(record, None) == {}
    card = privacy_facts(record, folder)
    assert "of windows read 0.0% continue" in card["Memorization"]
    own = {"reference": str(folder)}  # compared with itself nobody is told apart
    again = measured(tmp_path / "runs/run", windows=60, prefixes=[8], continuation=8, **own)
    assert again["membership"]["reference"]["auc"]["value"] == 0.5
    print_findings(again)
    with pytest.raises(ConfigError, match="have 80 tokens, a window of the run 65"):
        main(MemorizationConfig(str(folder), prefixes=[48]))
    with pytest.raises(DataError, match="the list of canaries nowhere cannot be read"):
        main(MemorizationConfig(str(folder), prefixes=[8], canaries="nowhere", windows=10**9))
    with pytest.raises(ConfigError, match="seed .-1. must be at least 0"):
        main(MemorizationConfig(str(folder), prefixes=[8], seed=-1))
    with pytest.raises(ConfigError, match="windows, prefixes must be at least 1"):
        main(MemorizationConfig(str(folder), prefixes=[], windows=0))
    place = memorization_file.place_of(folder)
    place.write_text(json.dumps({"step": 10}))
    with pytest.raises(DataError, match="is not what pipeline.memorization writes"):
        memorization_file.read(place)
