"""Bits per byte: the bytes are those of the text, whatever the tokenizer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.data.batch import Batch
from pipeline.data.datasets import Dataset, open_datasets
from pipeline.data.tokenizer import Tokenizer
from pipeline.evaluation.perplexity import LabelBytes, with_wrong_pictures
from tests.support.corpus import edit_tokenizer, make_texts, make_tokenizer
from tests.support.token_dataset import write_dataset

TEXTS = make_texts(12)


def dataset(folder: Path, tokens: np.ndarray, tokenizer: Path) -> Dataset:
    """Its documents end with id 0, as the manifest says."""
    write_dataset(folder / "data", [tokens], vocab_size=400, tokenizer=tokenizer.read_bytes())
    cfg = DataConfig()
    one = DatasetConfig(path=str(folder / "data"))
    return open_datasets([one], cfg=cfg, cache_dir=folder / "cache")[0]


def stream(tokenizer: Tokenizer) -> np.ndarray:
    """End, document, end, document, ..., end."""
    return np.array([0, *(i for text in TEXTS for i in [*tokenizer.encode(text), 0])])


def batch(tokens: np.ndarray, **fields: Any) -> Any:
    row = torch.from_numpy(tokens)[None]
    return SimpleNamespace(**{"tokens": row[:, :-1], "labels": row[:, 1:], "loss_mask": None} | fields)  # fmt: skip


@pytest.mark.parametrize("prefix", [False, True])
def test_bytes_of_labels_are_those_of_the_text(prefix: bool, tmp_path: Path) -> None:
    """A space that the tokenizer puts before each document is not in the text."""
    path = make_tokenizer(tmp_path / "tokenizer.json")
    if prefix:
        backend = Backend.from_file(str(path))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.save(str(path))
    tokens = stream(Tokenizer.from_file(path))
    counter = LabelBytes(dataset(tmp_path, tokens, path), vocab_size=512, device=torch.device("cpu"))  # fmt: skip
    assert float(counter.count(batch(tokens))) == sum(len(text.encode()) for text in TEXTS)
    mask = torch.zeros(1, len(tokens) - 1)
    assert float(counter.count(batch(tokens, loss_mask=mask))) == 0


def test_forgetful_tokenizers_count_the_bytes_of_the_text(tmp_path: Path) -> None:
    """NFKC changes how long a text is: the manifest's 4 bytes a token count."""
    path = edit_tokenizer(make_tokenizer(tmp_path / "tokenizer.json"), normalizer={"type": "NFKC"})
    tokens = stream(Tokenizer.from_file(path))
    counter = LabelBytes(dataset(tmp_path, tokens, path), vocab_size=400, device=torch.device("cpu"))  # fmt: skip
    assert float(counter.count(batch(tokens))) == 4 * (len(tokens) - 1)


def test_the_manifest_says_what_ends_documents(tmp_path: Path) -> None:
    """A tokenizer without a known end (the dataset was made with eod=ID) was refused."""
    path = edit_tokenizer(make_tokenizer(tmp_path / "tokenizer.json"), added_tokens=[])
    ours = Tokenizer.from_file(path, eod=0)
    tokens = stream(ours)
    counter = LabelBytes(dataset(tmp_path, tokens, path), vocab_size=400, device=torch.device("cpu"))  # fmt: skip
    assert float(counter.count(batch(tokens))) == sum(len(text.encode()) for text in TEXTS)


def test_wrong_pictures_are_those_of_the_row_before() -> None:
    """Across micro-batches too, so that rows that are scored one by one see another picture."""
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1, 1)
    empty = torch.zeros(2, 1, dtype=torch.int64)
    pairs = [
        Batch(
            tokens=empty, labels=empty, loss_mask=None, document_ids=None, positions=None,
            sample_ids=np.arange(2), images=images[at : at + 2], patch_ids=empty,
        )
        for at in (0, 2)
    ]  # fmt: skip
    wrong = [b.images.flatten().tolist() for b in with_wrong_pictures(iter(pairs)) if b.images is not None]  # fmt: skip
    assert wrong == [[1, 0], [1, 2]]
    assert pairs[0].images is not None and pairs[0].images.flatten().tolist() == [0, 1]
