"""Answers that a model would give word for word, told from one pass over the dialogue.

A greedy decoder repeats an answer exactly if and only if each of its tokens, its end included, is
the likeliest one after those before it: then it has made no other choice up to there. One forward
pass over the true answer sees all of these choices at once.

    learned (B, S): . . 1 1 1 . . 1 1 .      two answers: a run of learned labels each
"""

from __future__ import annotations

import torch
from torch import Tensor


def answer_numbers(learned: Tensor) -> Tensor:
    """(B, S) int64 from a (B, S) mask: 0 outside of answers, inside them 1 for the first, 2, ...

    Answers are told apart by what lies between them: the first token of a dialogue, and what
    precedes an answer in a turn, is never learned.
    """
    inside = learned != 0
    begins = inside.clone()
    begins[:, 1:] &= ~inside[:, :-1]
    return begins.flatten().cumsum(0).view_as(learned) * inside


def count_answers(learned: Tensor) -> Tensor:
    """0-dim fp32: answers in a micro-batch."""
    return answer_numbers(learned).amax().float()


def count_exact(hits: Tensor, learned: Tensor) -> Tensor:
    """0-dim fp32: answers all of whose labels are hit.

    Args:
        hits: (B, S) bool, where the label is the likeliest token.
        learned: (B, S) mask of labels.
    """
    numbers = answer_numbers(learned)
    # As many places as there may be numbers: nothing waits for the device to say how many are.
    wrong = torch.zeros(numbers.numel() + 1, device=numbers.device)
    wrong.index_add_(0, numbers.flatten(), (~hits).flatten().float())
    return numbers.amax().float() - (wrong[1:] > 0).sum()
