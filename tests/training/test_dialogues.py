"""Epochs of a small set of dialogues through the whole trainer: each row once an epoch, at any layout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.conversations import main as convert
from data_prep.tokens.conversation_job import ConversationConfig
from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.data.manifest import Manifest
from tests.support.corpus import make_tokenizer
from tests.support.ranks import run_on_ranks

ROW, BATCH = 128, 4
Rows = dict[int, list[tuple[int, ...]]]


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dialogues of one to three turns as rows of 128 tokens, prepared by the command."""
    folder = tmp_path_factory.mktemp("talks")
    make_tokenizer(folder / "tokenizer.json")
    with (folder / "talks.jsonl").open("w") as file:
        for number in range(38):
            messages = []
            for turn in range(1 + number % 3):
                messages += [
                    {"role": "user", "content": f"fox {number + turn}?"},
                    {"role": "assistant", "content": f"{number * turn + 1} dogs"},
                ]
            file.write(json.dumps({"messages": messages}) + "\n")
    words = [f"input={folder}/talks.jsonl", f"output={folder}/data", f"row_tokens={ROW}"]
    words += [f"tokenizer={folder}/tokenizer.json", "workers=1", "validation_fraction=0.05"]
    convert(cli.compose(ConversationConfig, words, config="conversations"))
    return folder / "data"


def train(arguments: list[str]) -> Rows:
    """pipeline.train in this rank; step to the rows that the engine got, each a sequence of ids."""
    from pipeline import train
    from pipeline.engine.engine import Engine

    seen: Rows = {}
    step_of: Callable[..., Any] = Engine.train_step

    def noted(self: Engine, batches: list[Any], *, step: int, **kwargs: Any) -> Any:
        if self.layout.tensor.rank == 0 and self.layout.pipeline.rank == 0:
            seen[step] = [tuple(row) for batch in batches for row in batch.tokens.tolist()]
        return step_of(self, batches, step=step, **kwargs)

    Engine.train_step = noted  # type: ignore[method-assign]
    train.main(cli.compose(PretrainConfig, arguments, config="pretrain"))
    return seen


def arguments(talks: Path, runs: Path, name: str, *, steps: int, **settings: Any) -> list[str]:
    values = {
        "name": name, "runs_dir": runs, "data.path": talks, "model": "tiny", "model.num_layers": 2, "model.hidden_size": 64,
        "training.total_steps": steps, "training.seq_len": ROW, "training.global_batch_size": BATCH,
        "training.micro_batch_size": 1, "training.precision": "fp32", "training.eval_every": 0, "schedule": "constant",
        "schedule.warmup_steps": 0, "tracking.log_every": 1, "tracking.sample_hash": "true", "tracking.wandb": "disabled",
        "data.cache_dir": runs, **settings,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def history(run: Path) -> dict[int, tuple[float, float, str]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    keys = ("train/loss", "train/grad_norm", "data/sample_hash")
    return {row["step"]: tuple(row[key] for key in keys) for row in rows if keys[0] in row}


@pytest.mark.slow
def test_two_epochs_with_a_resume_in_mid_epoch_at_another_layout(
    talks: Path, tmp_path: Path
) -> None:
    """One process to the end; two of ZeRO-3 into the second epoch, then tensor parallel."""
    num_rows = Manifest.load(talks / "train").tokens // ROW
    assert num_rows % BATCH, "an epoch that ends in mid-step is the harder one"
    epoch = num_rows / BATCH
    first, steps = math.ceil(1.5 * epoch), math.ceil(2 * epoch) + 1
    whole = run_on_ranks(train, 1, arguments(talks, tmp_path, "one", steps=steps))[0]
    zero = {"parallel.zero_stage": 3}
    parts = run_on_ranks(train, 2, arguments(talks, tmp_path, "two", steps=first, **zero))
    tensor = {"parallel.tensor_parallel_size": 2, "parallel.sequence_parallel": "true"}
    rest, other = run_on_ranks(train, 2, arguments(talks, tmp_path, "two", steps=steps, **tensor))
    assert other == {} and list(rest) == list(range(first, steps))

    two = {step: rows + parts[1][step] for step, rows in parts[0].items()} | rest
    for step in range(steps):
        assert sorted(two[step]) == sorted(whole[step]), f"other rows in step {step}"
    in_order = [row for step in range(steps) for row in whole[step]]
    epochs = [in_order[:num_rows], in_order[num_rows : 2 * num_rows]]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert len(set(epochs[0])) == num_rows

    want, found = history(tmp_path / "one"), history(tmp_path / "two")
    assert list(want) == list(found) == list(range(1, steps + 1))
    for step, (*numbers, samples) in want.items():
        assert found[step][2] == samples
        assert found[step][:2] == pytest.approx(numbers, rel=1e-5), step
