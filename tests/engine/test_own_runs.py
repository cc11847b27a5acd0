"""A rank that shares sequences is given its run of each, with everything that belongs to its tokens."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from pipeline.config.model import ModelConfig, VisionConfig
from pipeline.data.batch import Batch
from pipeline.engine.own_runs import own_runs

TEXT = ModelConfig(name="text", num_layers=2, hidden_size=8, num_attention_heads=2)


def test_what_belongs_to_a_token_is_cut_and_documents_stay_whole() -> None:
    """Labels and masks that were cut elsewhere than the tokens would train on other pairs."""
    tokens = torch.arange(24).view(2, 12)
    batch = Batch(
        tokens=tokens, labels=tokens + 1, loss_mask=None, document_ids=tokens // 5,
        positions=tokens % 5, sample_ids=np.arange(2), num_documents=6,
    )  # fmt: skip
    for rank in range(3):
        (own,) = own_runs([batch], SimpleNamespace(rank=rank, size=3), TEXT)
        columns = slice(4 * rank, 4 * rank + 4)
        assert torch.equal(own.tokens, tokens[:, columns]) and own.loss_mask is None
        assert torch.equal(own.labels, own.tokens + 1)
        assert torch.equal(own.positions, own.tokens % 5)
        assert own.document_ids is batch.document_ids and own.num_documents == 6
    assert batch.tokens is tokens
    assert own_runs([batch], SimpleNamespace(rank=0, size=1), TEXT)[0] is batch


def test_text_is_given_a_blank_picture_where_the_model_reads_pictures() -> None:
    """An encoder that does not run on one rank is a collective that its peers wait in for ever."""
    tokens = torch.arange(12).view(2, 6)
    batch = Batch(
        tokens=tokens, labels=tokens, loss_mask=None, document_ids=None, positions=None, sample_ids=np.arange(2)
    )  # fmt: skip
    sees = replace(TEXT, vision=VisionConfig(num_layers=1, image_size=4, patch_size=2))
    (own,) = own_runs([batch], SimpleNamespace(rank=1, size=2), sees)
    assert own.images is not None and own.images.shape == (2, 1, 3, 4, 4)
    assert own.images.dtype is torch.uint8 and not own.images.any()
    assert own.patch_ids is not None and own.patch_ids.tolist() == [[-1] * 3] * 2
    assert batch.images is None
    pictures = torch.ones(2, 3, 3, 4, 4, dtype=torch.uint8)
    (own,) = own_runs(
        [replace(batch, images=pictures, patch_ids=tokens)], SimpleNamespace(rank=1, size=2), sees
    )
    assert own.images is pictures, "each rank needs all pictures of its rows"
    assert own.patch_ids is not None and own.patch_ids.tolist() == [[3, 4, 5], [9, 10, 11]]
