"""Scores of heads on attention that is drawn by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.probing.heads import HALF, REPEATS, kinds, looks, repeated_tokens

T = 8


@pytest.mark.parametrize("name", ["previous", "duplicate", "induction"])
def test_a_head_of_one_kind_scores_1_there_and_0_elsewhere(name: str) -> None:
    """An offset by one would make an induction head of a duplicate head."""
    distance = {"previous": 1, "duplicate": T, "induction": T - 1}[name]
    attention = torch.zeros(2, 2 * T, 2 * T)
    for i in range(2 * T):
        is_meant = i >= distance if name == "previous" else i >= T
        attention[:, i, i - distance if is_meant else i] = 1.0
    found = {kind: float(value) for kind, value in kinds(attention, T).items()}
    assert found == {kind: float(kind == name) for kind in found}


def test_entropy_and_sink_count_the_tokens_that_count() -> None:
    """The first token looks at itself whatever the head does; masked ones may hold anything."""
    attention = torch.ones(1, 4, 4).tril()
    attention /= attention.sum(-1, keepdim=True)
    weights = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    found = {name: float(value) for name, value in looks(attention, weights).items()}
    assert found == pytest.approx({"entropy": math.log(2) + math.log(4), "sink": 1 / 2 + 1 / 4})


@pytest.mark.parametrize(("seq_len", "half"), [(1024, HALF), (100, 32), (32, 16)])
def test_random_tokens_are_repeated_once_and_fit_the_model(seq_len: int, half: int) -> None:
    ids, found = repeated_tokens(250, seq_len=seq_len)
    assert ids.shape == (REPEATS, 2 * half) and found == half
    assert torch.equal(ids[:, :half], ids[:, half:]) and int(ids.max()) < 250
    assert torch.equal(ids, repeated_tokens(250, seq_len=seq_len)[0])


def test_three_ranks_that_share_a_sequence_have_equal_parts_of_it() -> None:
    """128 tokens do not divide by 3, 6 or 12; what fills up changes no score."""
    ids, half = repeated_tokens(250, seq_len=768, parts=3)
    assert ids.shape == (REPEATS, 129) and half == HALF
    assert torch.equal(ids[:, :128], repeated_tokens(250, seq_len=768)[0])
    attention = torch.rand(2, 2 * T + 1, 2 * T + 1)
    assert kinds(attention, T) == kinds(attention[:, :-1, :-1], T)
