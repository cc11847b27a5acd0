"""The law: what a fit finds in losses whose law is known, and how often its interval is right."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.scaling.law import DELTA, Law, fit, fit_all, interval_of

CHINCHILLA = Law(E=1.69, log_A=math.log(406.4), log_B=math.log(410.7), alpha=0.34, beta=0.28)


def ladder(sizes: list[float], tokens: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, D, L) of every size with every number of tokens, without noise."""
    n, d = (column.ravel() for column in np.meshgrid(sizes, tokens))
    return n, d, np.array([CHINCHILLA.loss(*run) for run in zip(n, d)])


def losses_of(found: np.ndarray, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
    """Predicted losses of fit_all's coefficients, one more axis where n and d have one."""
    a, b, e, alpha, beta = (found[..., None, k] for k in range(5))
    return np.exp(a - alpha * np.log(n)) + np.exp(b - beta * np.log(d)) + np.exp(e)


WIDE = ladder(list(np.geomspace(1e7, 1e9, 7)), list(np.geomspace(5e8, 5e10, 7)))


def test_without_noise_every_coefficient_is_found_to_seven_digits():
    """A fit that its tolerance ends early is what could not be replicated (arXiv:2404.10102)."""
    n, d, losses = WIDE
    law = fit(n, d, losses, num_draws=0).law
    found = [law.E, law.A, law.B, law.alpha, law.beta]
    assert found == pytest.approx([1.69, 406.4, 410.7, 0.34, 0.28], rel=1e-6)


def test_with_noise_the_exponents_are_within_5_percent():
    """49 runs, 0.1 % of noise each, ten times over."""
    n, d, losses = WIDE
    noise = np.random.default_rng(0).standard_normal((10, len(n)))
    found, _ = fit_all(n, d, losses * np.exp(0.001 * noise))
    assert abs(found[:, 3] / 0.34 - 1).max() < 0.05
    assert abs(found[:, 4] / 0.28 - 1).max() < 0.05


def test_the_interval_holds_the_truth_in_at_least_85_of_100_repetitions():
    """Sixteen runs, and a run of 48 times the compute of the largest: stated as 90 %."""
    n, d, losses = ladder([4e7, 8e7, 1.6e8, 3.2e8], [5e8, 1e9, 2e9, 4e9])
    rng = np.random.default_rng(1)
    measured = losses * np.exp(0.003 * rng.standard_normal((100, len(n))))
    found, draws = fit_all(n, d, measured, num_draws=50)
    residuals = np.log(measured) - np.log(losses_of(found, n, d))
    size, tokens = 1.2e9, 5e10
    # One more run is as noisy as those of the ladder.
    truth = CHINCHILLA.loss(size, tokens) * np.exp(0.003 * rng.standard_normal(100))
    low, high = interval_of(np.log(losses_of(draws, size, tokens))[..., 0], residuals).T
    assert ((low <= truth) & (truth <= high)).sum() >= 85
    assert np.median((high - low) / truth) < 0.08, "an interval that holds everything says nothing"


def test_a_run_that_went_wrong_does_not_bend_the_law():
    """Huber's loss: one loss 20 % too high moves the exponents by less than a tenth."""
    n, d, losses = WIDE
    losses = losses.copy()
    losses[10] *= 1.2
    law = fit(n, d, losses, num_draws=0).law
    assert law.alpha == pytest.approx(0.34, rel=0.1) and law.beta == pytest.approx(0.28, rel=0.1)


def test_no_other_start_finds_a_better_fit():
    """The objective has several valleys: 400 random starts, none below the one that was chosen."""
    from pipeline.scaling import law as module

    n, d, losses = ladder([4e7, 8e7, 1.6e8, 3.2e8], [5e8, 1e9, 2e9, 4e9])
    rng = np.random.default_rng(3)
    logs = np.log(losses * np.exp(0.005 * rng.standard_normal(len(n))))[None]
    x, y = np.log(n) - np.log(n).mean(), np.log(d) - np.log(d).mean()
    best, _ = fit_all(n, d, np.exp(logs))
    best[0, :2] -= best[0, 3:] * [np.log(n).mean(), np.log(d).mean()]
    once = np.ones((1, len(n)))
    found, _ = module._objective(best, x, y, logs, once, DELTA)
    starts = rng.uniform([-3, -3, -3, 0, 0], [2, 2, 2, 1.5, 1.5], size=(400, 5))
    repeated = np.repeat(logs, 400, axis=0), np.repeat(once, 400, axis=0)
    _, others = module._minimise(starts, x, y, *repeated, DELTA)
    assert found[0] <= others.min() * (1 + 1e-6)


def test_the_best_size_for_a_budget_is_the_one_of_least_loss():
    budget = 6e21
    parameters, tokens = CHINCHILLA.optimum(budget)
    assert 6 * parameters * tokens == pytest.approx(budget)
    others = [CHINCHILLA.loss(n, budget / 6 / n) for n in np.geomspace(1e8, 1e12, 400)]
    assert CHINCHILLA.loss(parameters, tokens) <= min(others)


def test_an_interval_is_wider_of_fewer_runs():
    """Five coefficients of eight runs leave three to say how noisy a run is."""
    n, d, losses = WIDE
    measured = losses * np.exp(0.003 * np.random.default_rng(5).standard_normal(len(n)))
    many = fit(n, d, measured, num_draws=100).interval(5e9, 2e11)
    few = [0, 6, 21, 24, 27, 42, 45, 48]
    wide = fit(n[few], d[few], measured[few], num_draws=100).interval(5e9, 2e11)
    assert wide[1] - wide[0] > many[1] - many[0]
