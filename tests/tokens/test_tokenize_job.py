"""Documents one behind the other with their end marks, in pieces."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from data_prep.tokens import tokenize_job


@pytest.mark.parametrize("piece", [1, 3, 7, 1000])
def test_pieces_of_marked_documents_join_to_the_whole(piece, monkeypatch):
    """Where a piece ends must not show: at an end mark, inside a document, or before an empty one."""
    monkeypatch.setattr(tokenize_job, "PIECE_TOKENS", piece)
    texts = [list(range(1, 8)), [], [8], [9, 10, 11], []]
    lengths = np.array([len(text) for text in texts])
    ids = np.array([i for text in texts for i in text], np.uint32)
    pieces = list(tokenize_job.with_end_marks(ids, lengths, 0, np.dtype("<u2")))
    assert max(len(tokens) for tokens, _, _ in pieces) <= piece
    assert np.concatenate([tokens for tokens, _, _ in pieces]).tolist() == [
        i for text in texts for i in [*text, 0]
    ]
    before = np.cumsum([0, *(len(tokens) for tokens, _, _ in pieces)])
    places = [int(s) + b for (_, starts, _), b in zip(pieces, before.tolist()) for s in starts]
    assert places == [0, 8, 9, 11, 15]
    assert [n for _, _, here in pieces for n in range(5)[here]] == list(range(5))


def test_a_huge_document_is_not_marked_whole(monkeypatch):
    """A copy of its ids and a mask, three bytes a token, lay beside text and ids: a worker was killed."""
    monkeypatch.setattr(tokenize_job, "PIECE_TOKENS", 2**16)
    ids = np.ones(2**21, np.uint32)
    tracemalloc.start()
    try:
        pieces = tokenize_job.with_end_marks(ids, np.array([len(ids)]), 0, np.dtype("<u2"))
        count = sum(len(tokens) for tokens, _, _ in pieces)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == len(ids) + 1 and peak < 2**20
