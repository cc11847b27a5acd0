"""A rank that shares sequences is given its run of each, with everything that belongs to its tokens."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from pipeline.data.batch import Batch
from pipeline.engine.own_runs import own_runs


def test_what_belongs_to_a_token_is_cut_and_documents_stay_whole() -> None:
    """Labels and masks that were cut elsewhere than the tokens would train on other pairs."""
    tokens = torch.arange(24).view(2, 12)
    batch = Batch(
        tokens=tokens, labels=tokens + 1, loss_mask=None, document_ids=tokens // 5,
        positions=tokens % 5, sample_ids=np.arange(2), num_documents=6,
    )  # fmt: skip
    for rank in range(3):
        (own,) = own_runs([batch], SimpleNamespace(rank=rank, size=3))
        columns = slice(4 * rank, 4 * rank + 4)
        assert torch.equal(own.tokens, tokens[:, columns]) and own.loss_mask is None
        assert torch.equal(own.labels, own.tokens + 1)
        assert torch.equal(own.positions, own.tokens % 5)
        assert own.document_ids is batch.document_ids and own.num_documents == 6
    assert batch.tokens is tokens
    assert own_runs([batch], SimpleNamespace(rank=0, size=1))[0] is batch
