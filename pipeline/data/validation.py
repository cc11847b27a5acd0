"""Held-out datasets, window after window in their order on disk, the same for every layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from pipeline.config.data import DataConfig
from pipeline.data.batch import Batch, Masks, make_batches
from pipeline.data.datasets import Dataset, check_has_labels
from pipeline.data.order import num_windows
from pipeline.data.reader import Reader

NO_SETTINGS = DataConfig()


def validation_batches(
    dataset: Dataset,
    *,
    seq_len: int,
    micro_batch_size: int,
    data_rank: int,
    data_parallel_size: int,
    num_sequences: int,
    device: torch.device,
    cfg: DataConfig = NO_SETTINGS,
    begin: int = 0,
) -> Iterator[Batch]:
    """num_sequences windows of a dataset in their order on disk (0: all), at any layout.

    Every rank yields the same number of batches; sequences that only fill the last ones have
    loss_mask 0, and so has what a shard's last window lacks: every token but each shard's first is
    a label once.

    Args:
        dataset: of facts.open_datasets(cfg.validation, ...).
        seq_len: tokens of a window.
        micro_batch_size: sequences of a Batch.
        data_rank: of this rank.
        data_parallel_size: ranks that share the windows.
        num_sequences: windows in all; 0: every one.
        device: where the tensors go.
        cfg: whose masks give the attention that the model is trained with.
        begin: number of the first window.
    """
    reader = Reader([dataset], seq_len=seq_len)
    masks = dataclasses.replace(Masks.of(cfg, packed=dataset.is_packed), loss=True)
    first = _first_windows(dataset, seq_len)
    end = int(first[-1])
    total = end if num_sequences == 0 else min(begin + num_sequences, end)
    check_has_labels(dataset)
    stride = micro_batch_size * data_parallel_size
    for start in range(begin, total, stride):
        number = start + data_rank * micro_batch_size + np.arange(micro_batch_size)
        # Past the end a rank reads the last window again and masks all of it: with a batch less
        # than its peers it would miss their collectives, and they would wait for ever.
        inside = np.minimum(number, total - 1)
        shard = np.searchsorted(first, inside, "right") - 1
        windows = reader.gather(
            np.zeros_like(shard), shard, inside - first[shard], documents=masks.documents
        )
        windows.num_labels[number >= total] = 0
        yield from make_batches(
            windows,
            number,
            seq_len=seq_len,
            micro_batch_size=micro_batch_size,
            masks=masks,
            eod=reader.eod,
            device=device,
            placeholder=reader.placeholder,
        )


def beginnings(
    dataset: Dataset,
    *,
    seq_len: int,
    parts: int,
    device: torch.device,
    cfg: DataConfig = NO_SETTINGS,
    rows: int = 8,
    tokens: int = 128,
    least: int = 64,
) -> Batch:
    """The first tokens of the first windows of a dataset, the same on every rank that asks.

    Args:
        dataset, seq_len, device, cfg: as in `validation_batches`.
        parts: sequence-parallel ranks, which take equal parts; seq_len is a multiple.
        rows: windows; those that the dataset lacks have loss_mask 0.
        tokens: of each window. Twice as many of half of the windows, and so on, until enough labels
            count: of dialogues and pictures the first tokens may hold none.
        least: labels that count, over all rows.
    """
    (batch,) = validation_batches(
        dataset,
        seq_len=seq_len,
        micro_batch_size=rows,
        data_rank=0,
        data_parallel_size=1,
        num_sequences=rows,
        device=device,
        cfg=cfg,
    )
    assert batch.loss_mask is not None
    # rows * tokens stays: of 8 windows of 8,192 tokens the lens of 32 blocks of width 4,096 would
    # hold 17 GB in the middle of a training that fits.
    while tokens < seq_len and batch.loss_mask[:rows, :tokens].sum() < least:
        tokens, rows = 2 * tokens, max(1, rows // 2)
    return batch.beginning(rows=rows, tokens=min(seq_len, -(-tokens // parts) * parts))


def count_windows(dataset: Dataset, *, seq_len: int) -> int:
    """How many windows a dataset has."""
    return int(_first_windows(dataset, seq_len)[-1])


def _first_windows(dataset: Dataset, seq_len: int) -> np.ndarray:
    """(shards + 1,) number of each shard's first window, and how many there are."""
    per_shard = num_windows(dataset.shard_tokens, seq_len, packed=dataset.is_packed)
    return np.concatenate([[0], np.cumsum(per_shard)])
