"""What an attacker learns from a model, as numbers: exposure, extraction, membership; no torch.

    losses of a secret and of secrets that were never planted --exposure--> bits
    scores of windows that were read, and that were not      --membership--> AUC, TPR at 1 % FPR
    continuations and what really follows                    --matches--> exact, near

Each mean has an interval, from resampling what was measured; each measure its value by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Numbers = np.ndarray
RESAMPLINGS = 1000
FALSE_POSITIVES = 0.01
NEAR = 0.1
"""Edit distance over length below which a continuation is nearly what follows (Ippolito et al.
2022, arXiv:2210.17546, discuss the choice)."""


@dataclass(frozen=True)
class Interval:
    """A value, and the 95 % interval of its bootstrap."""

    value: float
    low: float
    high: float


def exposure(loss: float, references: Numbers) -> float:
    """Bits: log2(n + 1) - log2(rank) of a secret among n references (arXiv:1802.08232, section 4).

    Args:
        loss: nats of the secret.
        references: (n,) nats of other secrets in its place; rank 1 is below all of them.
    """
    rank = 1 + int((references < loss).sum())
    return math.log2(len(references) + 1) - math.log2(rank)


def chance_exposure(num_references: int) -> float:
    """Mean exposure of a secret like any other: its rank is each of 1 .. n + 1 alike; near 1.44."""
    ranks = np.arange(1, num_references + 2)
    return float(math.log2(num_references + 1) - np.log2(ranks).mean())


def mean(values: Sequence[float] | Numbers, *, seed: int) -> Interval:
    """The mean of values."""
    numbers = np.asarray(values, np.float64)
    draws = np.random.default_rng(seed).integers(0, len(numbers), (RESAMPLINGS, len(numbers)))
    return _interval(float(numbers.mean()), numbers[draws].mean(1))


def auc(members: Numbers, others: Numbers) -> float:
    """Chance that a member's score is above another's; ties count half. 0.5: nothing is learned."""
    ranks = _ranks(np.concatenate([members, others]))
    above = ranks[: len(members)].sum() - len(members) * (len(members) + 1) / 2
    return float(above / (len(members) * len(others)))


def true_positives(members: Numbers, others: Numbers) -> float:
    """Share of members above the threshold that 1 % of the others exceed at most.

    Source: Carlini et al. 2022, arXiv:2112.03570: an attack that is right of few, and sure, counts.
    """
    allowed = math.floor(FALSE_POSITIVES * len(others))
    threshold = np.sort(others)[len(others) - 1 - allowed]
    return float((members > threshold).mean())


def with_interval(
    measure: Callable[[Numbers, Numbers], float], members: Numbers, others: Numbers, *, seed: int
) -> Interval:
    """A measure of two samples, and its interval by resampling both."""
    random = np.random.default_rng(seed)
    drawn = [
        measure(random.choice(members, len(members)), random.choice(others, len(others)))
        for _ in range(RESAMPLINGS)
    ]
    return _interval(measure(members, others), np.array(drawn))


def min_k(log_probabilities: Numbers, percent: float) -> Numbers:
    """(n,) mean of each row's lowest `percent` of (n, tokens) log-probabilities.

    Source: Shi et al. 2023, arXiv:2310.16789: a text that was never read has a few very unlikely
    tokens.
    """
    count = max(1, round(log_probabilities.shape[1] * percent / 100))
    lowest = np.partition(log_probabilities, count - 1, axis=1)[:, :count]
    result: Numbers = lowest.mean(1)
    return result


def distances(continuations: Numbers, truths: Numbers) -> Numbers:
    """(n,) edit distance of the rows of two (n, tokens) arrays of ids, over their length."""
    _, length = truths.shape
    row = np.broadcast_to(np.arange(length + 1), (len(truths), length + 1)).copy()
    for i in range(length):
        last, row = row, np.empty_like(row)
        row[:, 0] = i + 1
        differs = truths != continuations[:, i : i + 1]
        for j in range(length):
            row[:, j + 1] = np.minimum(
                np.minimum(row[:, j], last[:, j + 1]) + 1, last[:, j] + differs[:, j]
            )
    result: Numbers = row[:, -1] / length
    return result


def _ranks(values: Numbers) -> Numbers:
    """Ranks from 1 on; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    result: Numbers = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return result


def _interval(value: float, drawn: Numbers) -> Interval:
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(value, float(low), float(high))
