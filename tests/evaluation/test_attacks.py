"""Measures of an attacker's knowledge against hand-worked numbers, brute force and what is known of chance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.evaluation import attacks


def test_exposure_of_the_likeliest_is_the_maximum_and_of_the_unlikeliest_none() -> None:
    references = np.arange(1.0, 16.0)  # 15 of them: ranks 1 to 16
    assert attacks.exposure(0.5, references) == 4.0
    assert attacks.exposure(99.0, references) == 0.0
    assert attacks.exposure(4.5, references) == pytest.approx(4 - math.log2(5))


def test_of_equal_secrets_none_stands_out() -> None:
    """A model that knows nothing gave each of them the largest exposure."""
    assert attacks.exposure(2.0, np.full(15, 2.0)) == pytest.approx(4 - math.log2(8.5))
    assert attacks.exposure(2.0, np.array([1.0, 2.0, 3.0])) == pytest.approx(2 - math.log2(2.5))


def test_chance_is_what_random_secrets_have_and_near_log2_e() -> None:
    random = np.random.default_rng(0)
    drawn = [attacks.exposure(random.random(), random.random(255)) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(attacks.chance_exposure(255), abs=0.1)
    assert attacks.chance_exposure(100_000) == pytest.approx(math.log2(math.e), abs=1e-3)


def test_auc_and_true_positives_are_those_of_the_definition() -> None:
    random = np.random.default_rng(1)
    members, others = random.integers(0, 9, 40) + 2.0, random.integers(0, 9, 300) * 1.0
    pairs = [(m > o) + (m == o) / 2 for m in members for o in others]
    assert attacks.auc(members, others) == pytest.approx(np.mean(pairs))
    found = attacks.true_positives(members, others)
    rates = [
        ((others > t).mean(), (members > t).mean()) for t in np.arange(-1.0, 12.0)
    ]  # fmt: skip
    assert found == max(true for false, true in rates if false <= 0.01)


def test_nothing_learned_is_one_half_and_all_learned_is_one() -> None:
    others = np.linspace(0, 1, 200)
    assert attacks.auc(others, others) == 0.5
    assert attacks.auc(others + 2, others) == attacks.true_positives(others + 2, others) == 1.0


def test_an_interval_holds_the_value_and_shrinks_with_more_samples() -> None:
    random = np.random.default_rng(2)
    few = attacks.mean(random.random(20), most=1.0, seed=0)
    many = attacks.mean(random.random(2000), most=1.0, seed=0)
    assert few.low < few.value < few.high and many.low < many.value < many.high
    assert 5 < (few.high - few.low) / (many.high - many.low) < 20  # sqrt(100) = 10
    members, others = random.normal(1, 1, 100), random.normal(0, 1, 100)
    found = attacks.with_interval(attacks.auc, members, others, seed=0)
    assert found.low < found.value < found.high < 1
    assert found.low < 0.76 < found.high  # Phi(1 / sqrt 2)


def test_none_of_n_and_all_of_n_have_an_interval() -> None:
    """Resampling gives them one of no width, as if nothing else could be."""
    none, every = attacks.share(np.zeros(256, bool)), attacks.share(np.ones(256, bool))
    assert (none.value, none.low) == (0.0, 0.0) and none.high == pytest.approx(0.01478, abs=1e-5)
    assert (every.value, every.high) == (1.0, 1.0) and every.low == pytest.approx(1 - none.high)
    some = attacks.share(np.arange(10) < 1)  # of 10 one: Newcombe 1998 has 0.0179 to 0.4042
    assert (some.low, some.high) == (pytest.approx(0.0179, abs=1e-4), pytest.approx(0.4042, abs=1e-4))  # fmt: skip
    members, others = np.arange(60.0) + 100, np.arange(80.0)
    for measure, swapped, value in (
        (attacks.auc, False, 1.0), (attacks.auc, True, 0.0), (attacks.true_positives, True, 0.0)
    ):  # fmt: skip
        pair = (others, members) if swapped else (members, others)
        found = attacks.with_interval(measure, *pair, seed=0)
        bound = attacks.share(np.full(60, value == 1.0))
        assert (found.value, found.low, found.high) == (value, bound.low, bound.high)
    known = attacks.mean([7.0, 7.0, 7.0], most=7.0, seed=0)
    assert known.high == 7.0 and known.low == pytest.approx(7 * attacks.share([True] * 3).low)


def test_min_k_is_the_mean_of_the_unlikeliest() -> None:
    rows = np.array([[-1.0, -9.0, -2.0, -3.0, -7.0], [-1.0, -1.0, -1.0, -1.0, -6.0]])
    np.testing.assert_allclose(attacks.min_k(rows, 40), [-8.0, -3.5])
    np.testing.assert_allclose(attacks.min_k(rows, 1), [-9.0, -6.0])


def levenshtein(a: list[int], b: list[int]) -> int:
    """The recursive definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        levenshtein(a[1:], b) + 1,
        levenshtein(a, b[1:]) + 1,
        levenshtein(a[1:], b[1:]) + (a[0] != b[0]),
    )


def test_distances_are_levenshtein_s() -> None:
    random = np.random.default_rng(3)
    said, truth = random.integers(0, 3, (20, 6)), random.integers(0, 3, (20, 6))
    truth[0], truth[1, 1:] = said[0], said[1, :-1]
    expected = [levenshtein(a.tolist(), b.tolist()) / 6 for a, b in zip(said, truth)]
    np.testing.assert_allclose(attacks.distances(said, truth), expected)
