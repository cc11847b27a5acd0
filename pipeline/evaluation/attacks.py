"""What an attacker learns from a model, as numbers: exposure, extraction, membership; no torch.

    losses of a secret and of secrets that were never planted --exposure--> bits
    scores of windows that were read, and that were not      --membership--> AUC, TPR at 1 % FPR
    continuations and what really follows                    --matches--> exact, near

Each number has an interval: a share Wilson's, the others that of resampling what was measured, and
Wilson's where that has no width (_interval). Each measure has its value by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Numbers = np.ndarray
RESAMPLINGS = 1000
FALSE_POSITIVES = 0.01
Z = 1.959964  # standard deviations of a normal number on both sides, for 95 %
NEAR = 0.1
"""Edit distance over length up to which a continuation is nearly what follows (Ippolito et al.
2022, arXiv:2210.17546, discuss the choice)."""


@dataclass(frozen=True)
class Interval:
    """A value, and its 95 % interval."""

    value: float
    low: float
    high: float


def exposure(loss: float, references: Numbers) -> float:
    """Bits: log2(n + 1) - log2(rank) of a secret among n references (arXiv:1802.08232, section 4).

    Args:
        loss: nats of the secret.
        references: (n,) nats of other secrets in its place; rank 1 is below all of them. Equal ones
            count half: to a model that knows nothing all are equal, and none of them stands out.
    """
    rank = 1 + float((references < loss).sum()) + float((references == loss).sum()) / 2
    return math.log2(len(references) + 1) - math.log2(rank)


def chance_exposure(num_references: int) -> float:
    """Mean exposure of a secret like any other: its rank is each of 1 .. n + 1 alike; near 1.44."""
    ranks = np.arange(1, num_references + 2)
    return float(math.log2(num_references + 1) - np.log2(ranks).mean())


def share(hits: Sequence[bool] | Numbers) -> Interval:
    """How many of them hit."""
    return _wilson(float(np.mean(hits)), len(hits))


def mean(values: Sequence[float] | Numbers, *, most: float, seed: int) -> Interval:
    """The mean of values from 0 to `most`."""
    numbers = np.asarray(values, np.float64)
    draws = np.random.default_rng(seed).integers(0, len(numbers), (RESAMPLINGS, len(numbers)))
    drawn = numbers[draws].mean(1)
    return _interval(float(numbers.mean()), drawn, most=most, count=len(numbers))


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
    """A measure from 0 to 1 of two samples, and its interval by resampling both."""
    random = np.random.default_rng(seed)
    drawn = [
        measure(random.choice(members, len(members)), random.choice(others, len(others)))
        for _ in range(RESAMPLINGS)
    ]
    count = min(len(members), len(others))
    return _interval(measure(members, others), np.array(drawn), most=1.0, count=count)


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


def _interval(value: float, drawn: Numbers, *, most: float, count: int) -> Interval:
    """The middle 95 % of the resamplings.

    Where they are all the same, as of 0 of n, the interval is that of a share of `count`: no number
    from 0 to `most` varies more about its mean than one that is either of the two.
    """
    low, high = np.quantile(drawn, (0.025, 0.975))
    if low == high:
        found = _wilson(value / most, count)
        return Interval(value, most * found.low, most * found.high)
    return Interval(value, float(low), float(high))


def _wilson(value: float, count: int) -> Interval:
    """A share of `count`; of none of 256 at most 1.5 %.

    Source: Wilson 1927, Journal of the American Statistical Association 22, 209.
    """
    middle = (value + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(value * (1 - value) / count + (Z / (2 * count)) ** 2)
    return Interval(value, max(0.0, middle - half), min(1.0, middle + half))
