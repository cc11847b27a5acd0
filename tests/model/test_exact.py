"""Which answers are exact: hand-worked masks, and what decoding itself would have said."""

from __future__ import annotations

import torch

from pipeline.model.exact import answer_numbers, count_answers, count_exact

#          two answers in the first row, the second up to its end; two in the next, from its start
LEARNED = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 0, 0, 1, 1, 0]]).float()


def test_a_run_of_learned_labels_is_an_answer_and_ends_with_its_row() -> None:
    numbers = answer_numbers(LEARNED)
    assert numbers.tolist() == [[0, 1, 1, 0, 2, 2], [3, 0, 0, 4, 4, 0]]
    assert float(count_answers(LEARNED)) == 4
    assert float(count_answers(torch.zeros(2, 5))) == 0
    assert float(count_answers(torch.ones(3, 5))) == 3


def test_an_answer_is_exact_when_all_of_its_labels_are_hit() -> None:
    hits = torch.ones(2, 6, dtype=torch.bool)
    assert float(count_exact(hits, LEARNED)) == 4
    hits[LEARNED == 0] = False  # what is not learned does not count
    assert float(count_exact(hits, LEARNED)) == 4
    hits[0, 2] = False
    assert float(count_exact(hits, LEARNED)) == 3
    hits[0, 1] = hits[1, 4] = False  # twice in one answer, and one more answer
    assert float(count_exact(hits, LEARNED)) == 2
    assert float(count_exact(hits, torch.zeros(2, 6))) == 0
