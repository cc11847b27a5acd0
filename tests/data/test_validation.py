"""The beginnings of held-out windows; whole windows, at any layout: test_loader.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.data import DatasetConfig
from pipeline.data.batch import Batch
from pipeline.data.datasets import open_datasets
from pipeline.data.validation import NO_SETTINGS, beginnings
from tests.support.token_dataset import write_dataset

ROWS = 8


@pytest.fixture
def tokens(tmp_path: Path) -> np.ndarray:
    """Of two shards, whose last windows are short."""
    found = np.random.default_rng(0).integers(1, 250, 3000)
    write_dataset(tmp_path / "data", np.split(found, [1700]))
    return found


def read(folder: Path, *, seq_len: int, parts: int = 1, least: int = 64) -> Batch:
    settings = [DatasetConfig(path=str(folder / "data"))]
    [dataset] = open_datasets(settings, cfg=NO_SETTINGS, cache_dir=folder / "cache")
    device = torch.device("cpu")
    return beginnings(
        dataset, seq_len=seq_len, parts=parts, device=device, rows=ROWS, tokens=128, least=least
    )


def test_the_first_tokens_of_the_first_windows_are_read(tokens: np.ndarray, tmp_path: Path) -> None:
    """Sequence-parallel ranks take equal parts; windows that are not there do not count."""
    batch = read(tmp_path, seq_len=300, parts=3)
    assert batch.tokens.shape == (ROWS, 129)
    np.testing.assert_array_equal(batch.tokens[1], tokens[300:429])
    np.testing.assert_array_equal(batch.labels[1], tokens[301:430])
    assert read(tmp_path, seq_len=60).tokens.shape == (ROWS, 60)
    few = read(tmp_path, seq_len=1024)
    assert few.loss_mask is not None and few.loss_mask.sum(1).tolist() == [128.0] * 4 + [0.0] * 4


def test_more_is_read_where_few_labels_count(tokens: np.ndarray, tmp_path: Path) -> None:
    """The first tokens of dialogues with pictures are a picture's. No more memory is taken."""
    assert read(tmp_path, seq_len=600, least=1025).tokens.shape == (1, 600)
    assert read(tmp_path, seq_len=300, least=10**6).tokens.shape == (2, 300)


def test_copies_of_rows_are_whole(tokens: np.ndarray, tmp_path: Path) -> None:
    """Every copy has its labels and its mask beside it."""
    batch = read(tmp_path, seq_len=60)
    again = batch.repeated(3)
    for name in ("tokens", "labels", "loss_mask"):
        wanted = torch.cat([getattr(batch, name)] * 3)
        torch.testing.assert_close(getattr(again, name), wanted, rtol=0, atol=0)
    assert again.num_documents == batch.num_documents and len(again.sample_ids) == 3 * ROWS
