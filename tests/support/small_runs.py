"""A ten-step run of the tiny model through the entry point, its data, and what it logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from tests.support.corpus import make_tokenizer
from tests.support.token_dataset import write_dataset

STEPS = 10
LOOKS: dict[str, Any] = {
    "training.probe_every": 4, "training.sample_every": 5, "training.sample_temperature": 0,
    "training.sample_tokens": 6, "training.sample_prompts": "[the]",
}  # fmt: skip
"""At heads and at what the model writes."""


def write_data(folder: Path) -> Path:
    """Train and validation splits of counting sequences, with a real tokenizer."""
    from pipeline.data.tokenizer import Tokenizer

    path = make_tokenizer(folder / "tokenizer.json")
    vocab_size = Tokenizer.from_file(path).vocab_size
    rng = np.random.default_rng(0)

    def shard(tokens: int) -> np.ndarray:
        rows = tokens // 32
        return (
            (rng.integers(0, 300, (rows, 1)) + np.arange(32) * rng.integers(1, 5, (rows, 1))) % 300
        ).reshape(-1)

    for split, sizes in (("train", (40_000, 30_000)), ("validation", (4_000,))):
        shards = [shard(size) for size in sizes]
        write_dataset(
            folder / split,
            shards,
            block_tokens=16384,
            vocab_size=vocab_size,
            tokenizer=path.read_bytes(),
        )
    return folder


def overrides(data: Path, runs: Path, name: str = "run", **settings: Any) -> list[str]:
    """A ten-step run of the tiny model that logs and hashes every step."""
    values = {
        "name": name, "runs_dir": runs, "data.path": data, "model": "tiny", "model.num_layers": 4, "model.hidden_size": 64,
        "training.total_steps": STEPS, "training.seq_len": 64, "training.global_batch_size": 8, "training.micro_batch_size": 2,
        "training.precision": "fp32", "training.eval_every": 5, "training.eval_sequences": 16, "checkpoint.save_every": 3,
        "schedule.warmup_steps": 2, "tracking.log_every": 1, "tracking.sample_hash": "true", "tracking.wandb": "disabled",
        **settings,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def train_on_ranks(arguments: list[str]) -> int:
    """pipeline.train in this rank."""
    from pipeline import train

    return train.main(cli.compose(PretrainConfig, arguments, config="pretrain"))


def history(run: Path) -> dict[int, tuple[float, float, str]]:
    """Step -> (loss, gradient norm, sample hash) as last logged."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        r["step"]: (r["train/loss"], r["train/grad_norm"], r["data/sample_hash"])
        for r in rows
        if "train/loss" in r
    }


def validation(run: Path) -> dict[int, float]:
    """Step -> held-out loss."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["val/validation/loss"] for r in rows if "val/validation/loss" in r}


def heads(run: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> what training.probe_every=4 logged: five scores, and the lens of four blocks."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {
        (row["step"], name): row[name]
        for row in rows
        for name in row
        if name.startswith(("probe/", "lens/"))
    }
    assert [step for step, _ in found] == [4] * 9 + [8] * 9
    return found
