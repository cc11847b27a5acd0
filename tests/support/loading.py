"""Loaders over small datasets whose tokens say where they come from: shared by the tests of the loader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.config.model import ModelConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape, derive
from pipeline.config.training import RampStage, TrainingConfig
from pipeline.data.loader import Loader
from tests.support.token_dataset import counting_shards, write_dataset

CPU = torch.device("cpu")
SEQ_LEN = 16
SIZES = [300, 170, 65, 17, 3, 999]
BASE = {
    "a": 0,
    "b": 10_000,
    "c": 20_000,
}  # tokens count up from here, so that a token says where it comes from
DOCUMENTS = [np.arange(0, n, 7) for n in SIZES]


def write_data(folder: Path) -> Path:
    """Three datasets of BASE, one of a single sequence, one of none."""
    for name, base in BASE.items():
        write_dataset(folder / name, counting_shards(SIZES, base=base), starts=DOCUMENTS)
    write_dataset(folder / "tiny", [np.arange(SEQ_LEN + 1)])
    write_dataset(folder / "short", [np.arange(SEQ_LEN)])
    return folder


def config(data: Path, weights: dict[str, float | None] | None = None, **settings) -> DataConfig:
    weights = weights or {"a": 0.7, "b": 0.3}
    return DataConfig(
        train=[DatasetConfig(path=str(data / n), weight=w) for n, w in weights.items()], **settings
    )


def shape_of(
    ranks: int, micro_batch_size: int = 1, *, batch: int = 16, ramp: tuple[RampStage, ...] = ()
) -> RunShape:
    model = ModelConfig(
        name="t", num_layers=1, hidden_size=8, num_attention_heads=1, max_seq_len=SEQ_LEN
    )
    training = TrainingConfig(
        total_steps=1000,
        global_batch_size=batch,
        micro_batch_size=micro_batch_size,
        ramp=list(ramp),
    )
    cfg = PretrainConfig(name="t", model=model, training=training)
    return derive(cfg, world_size=ranks, tokenizer_vocab_size=60000)


def loaders(
    cfg: DataConfig, shape: RunShape, state: dict | None = None, seed: int = 3, **settings: bool
) -> list[Loader]:
    made = [
        Loader(
            cfg,
            shape=shape,
            seed=seed,
            data_rank=rank,
            device=CPU,
            cache_dir=Path(cfg.train[0].path),
            **settings,
        )
        for rank in range(shape.sizes.data)
    ]
    for loader in made:
        if state is not None:
            loader.restore(json.loads(json.dumps(state)))
    return made


def read(
    cfg: DataConfig, shape: RunShape, steps: int, state: dict | None = None
) -> tuple[list, dict]:
    """([(hash, {sample: its sequences}) a step], state): what all ranks together saw, and that they agree."""
    made, seen = loaders(cfg, shape, state), []
    for _ in range(steps):
        rows: dict[int, list] = {}
        for loader in made:
            batches = loader.next_step()
            for batch in batches:
                assert (
                    batch.tokens.shape
                    == batch.labels.shape
                    == (shape.micro_batch_size, batch.tokens.shape[1])
                )
                assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
                for sample, tokens in zip(batch.sample_ids.tolist(), batch.tokens.tolist()):
                    rows.setdefault(sample, []).append(tokens)
        assert len({loader.sample_hash for loader in made}) == 1
        seen.append((made[0].sample_hash, rows))
    states = [loader.state() for loader in made]
    for loader in made:
        loader.close()
    assert all(state == states[0] for state in states)
    return seen, states[0]


def consumed(seen: list) -> dict[str, list[int]]:
    """First tokens read of each dataset, in order of the samples."""
    first = [rows[sample][0][0] for _, rows in seen for sample in sorted(rows)]
    return {name: [t for t in first if base <= t < base + 10_000] for name, base in BASE.items()}
