"""Windows that a run has read and windows that were held out, drawn for a comparison.

order up to the checkpoint --draw--> read        validation datasets --spread--> held out
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.checkpoint.record import CheckpointRecord
from pipeline.checkpoint.seen import Seen
from pipeline.data.datasets import Dataset, open_datasets
from pipeline.data.order import num_sequences
from pipeline.data.reader import Reader
from pipeline.errors import ConfigError

LEAST = 50
"""Windows of each kind: with fewer, no interval says anything."""


def known_windows(
    record: CheckpointRecord, seen: Seen, *, count: int, seed: int
) -> dict[str, Tensor]:
    """Name, read or held_out, to (n, seq_len + 1) ids, n at most `count`; each window once.

    Raises:
        ConfigError: the data are packed rows, nothing was held out, or too little of either.
    """
    data = record.data()
    if any(dataset.is_packed for dataset in seen.sampler.datasets):
        raise ConfigError(
            "the run read packed rows of dialogues, and windows of text are compared: measure a "
            "run over the output of data_prep/tokenize.py."
        )
    if not data.validation:
        raise ConfigError(
            "the run names no held-out data, with which what it has read could be compared: set "
            "data.path=OUT, whose split OUT/validation is held out, for the next run."
        )
    with tempfile.TemporaryDirectory() as scratch:
        # Those of `seen` only gave the order; the folder of their remote shards is gone.
        train = open_datasets(data.train, cfg=data, cache_dir=Path(scratch))
        train.sort(key=lambda dataset: seen.sampler.identities.index(dataset.identity))
        held_out = open_datasets(data.validation, cfg=data, cache_dir=Path(scratch))
        found = {
            "read": _read(seen, train, count, seed),
            "held_out": _spread(held_out, seen.seq_len, count),
        }
    for name, ids in found.items():
        if len(ids) < LEAST:
            raise ConfigError(
                f"there are {len(ids)} windows of {seen.seq_len} tokens for {name!r}, and a "
                f"comparison needs {LEAST}: hold out more (validation_fraction), or measure a "
                "later checkpoint."
            )
    return found


def _read(seen: Seen, datasets: Sequence[Dataset], count: int, seed: int) -> Tensor:
    """Windows of samples drawn evenly from all that were read."""
    random, there = np.random.default_rng(seed), seen.num_samples - seen.first_sample
    # Twice as many: one that was read in several epochs is drawn several times. Of a number, not of
    # an array: that of all samples of a run may have 16 GiB.
    drawn = seen.first_sample + np.sort(random.choice(there, min(2 * count, there), replace=False))
    places = np.unique(np.stack(seen.places(drawn)), axis=1)
    chosen = np.sort(random.permutation(places.shape[1])[:count])
    reader = Reader(datasets, seq_len=seen.seq_len)
    return _ids(reader, *places[:, chosen])


def _spread(datasets: Sequence[Dataset], seq_len: int, count: int) -> Tensor:
    """Whole windows of held-out datasets, at equal distances."""
    parts = [
        (np.full(int(n), source), np.full(int(n), shard), np.arange(int(n)))
        for source, dataset in enumerate(datasets)
        for shard, n in enumerate(num_sequences(dataset.shard_tokens, seq_len))
    ]
    places = np.concatenate([np.stack(part) for part in parts], axis=1).astype(np.int64)
    chosen = np.linspace(0, places.shape[1] - 1, min(count, places.shape[1])).astype(np.int64)
    return _ids(Reader(datasets, seq_len=seq_len), *places[:, np.unique(chosen)])


def _ids(reader: Reader, source: np.ndarray, shard: np.ndarray, sequence: np.ndarray) -> Tensor:
    return torch.from_numpy(reader.gather(source, shard, sequence).ids.astype(np.int64))
