"""L(N, D) = E + A / N^alpha + B / D^beta, fitted to the losses of small runs.

    log N, log D, log L --minimise from many starts--> Law;  with weights drawn anew--> draws of it

Chinchilla's third approach (Hoffmann et al. 2022, arXiv:2203.15556, section 3.3): the logarithm of
the law is a log-sum-exp of lines, residuals of log L go through Huber's loss with delta 1e-3.
Besiroglu et al. 2024 (arXiv:2404.10102) could not replicate its numbers, for three reasons that
are avoided here: losses were averaged instead of summed, so that the optimizer's tolerance ended
the fit early (here a fit ends when no step makes it better, whatever the scale of the objective);
coefficients were rounded before they were used (here they are kept as they are); and intervals
were far too narrow for so few runs (here a test counts how often they hold the truth).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
DELTA = 1e-3
"""Of Huber's loss, in log L: beyond a thousandth, a residual counts as it is and not squared."""
NUM_COEFFICIENTS = 5
MOST_STEPS = 400
# A fit has ended when this many steps in a row made it better by less than this part of it.
PATIENCE, LEAST_GAIN = 5, 1e-10
# Starts: E as a part of the least loss, A's share of what is above E, alpha, beta.
GRID = tuple(product((0.3, 0.6, 0.9), (0.3, 0.7), (0.15, 0.5), (0.15, 0.5)))
DRAW_GRID = ((0.3, 0.5, 0.4, 0.4), (0.8, 0.5, 0.4, 0.4))


@dataclass(frozen=True)
class Law:
    """The fitted curve; N are parameters as ladder.num_active counts them, D training tokens.

    A and B are kept as logarithms: where a draw of the bootstrap leaves an exponent without hold,
    both run away together, and only their sum means something.
    """

    E: float
    """Loss of an endless model on endless text, nats per token."""
    log_A: float
    log_B: float
    alpha: float
    beta: float

    @property
    def A(self) -> float:  # noqa: N802
        """Coefficient of the parameters' term."""
        return _exp(self.log_A)

    @property
    def B(self) -> float:  # noqa: N802
        """Coefficient of the tokens' term."""
        return _exp(self.log_B)

    def loss(self, parameters: float, tokens: float) -> float:
        """Predicted loss, nats per token."""
        of_parameters = _exp(self.log_A - self.alpha * math.log(parameters))
        return self.E + of_parameters + _exp(self.log_B - self.beta * math.log(tokens))

    def optimum(self, flops: float) -> tuple[float, float]:
        """The N and D of least loss for 6 N D = flops.

        Source: Hoffmann et al. 2022, equation 4. The law must fall with both.
        """
        log_scale = math.log(self.alpha / self.beta) + self.log_A - self.log_B
        log_parameters = (log_scale + self.beta * math.log(flops / 6)) / (self.alpha + self.beta)
        parameters = _exp(log_parameters)
        return parameters, flops / 6 / parameters

    @property
    def is_falling(self) -> bool:
        """Whether larger models and more tokens lower the loss."""
        return self.alpha > 0 and self.beta > 0


@dataclass(frozen=True)
class Fit:
    """A law, and what other weights of the runs would have made of it."""

    law: Law
    residuals: Floats
    """(runs,) measured over predicted loss, in log."""
    draws: tuple[Law, ...]
    """A law for each draw of weights."""

    def interval(
        self, parameters: float, tokens: float, *, level: float = 0.9, seed: int = 0
    ) -> tuple[float, float]:
        """Between which losses a run of this size and length lies with this probability.

        The law's own error, of the draws, and that of one more run, of the residuals.

        Args:
            level: probability, 0 to 1.
            seed: of the residuals that are drawn.
        """
        found = np.log([law.loss(parameters, tokens) for law in self.draws])
        low, high = interval_of(found[None], self.residuals[None], level=level, seed=seed)[0]
        return float(low), float(high)


def fit(
    parameters: Floats,
    tokens: Floats,
    losses: Floats,
    *,
    delta: float = DELTA,
    num_draws: int = 1000,
    seed: int = 0,
) -> Fit:
    """The law of these runs.

    Args:
        parameters: (runs,) N.
        tokens: (runs,) D.
        losses: (runs,) nats per token.
        delta: of Huber's loss.
        num_draws: of the bootstrap.
        seed: of its weights.
    """
    found, draws = fit_all(
        parameters, tokens, losses[None], delta=delta, num_draws=num_draws, seed=seed
    )
    law = _law(found[0])
    predicted = np.array([law.loss(n, d) for n, d in zip(parameters, tokens)])
    return Fit(law, np.log(losses) - np.log(predicted), tuple(map(_law, draws[0])))


def fit_all(
    parameters: Floats,
    tokens: Floats,
    losses: Floats,
    *,
    delta: float = DELTA,
    num_draws: int = 0,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """Fits of several sets of losses of the same runs, side by side.

    The bootstrap is Rubin's (1981): a draw gives every run a weight of its own, exponentially
    distributed, instead of leaving some runs out. Of a dozen runs, five coefficients and three
    sizes, drawing with replacement would often leave less than a law needs.

    Args:
        losses: (sets, runs); the others as fit.

    Returns:
        (sets, 5) and (sets, draws, 5): log A, log B, log E, alpha, beta.
    """
    # Around the runs' mean, the coefficients are the law's three terms there: numbers near 1 that
    # barely depend on the exponents, where log A and alpha alone are all but proportional.
    x, y = np.log(parameters), np.log(tokens)
    middle = np.array([x.mean(), y.mean()])
    x, y, logs = x - middle[0], y - middle[1], np.log(losses)
    num_sets, num_runs = logs.shape
    starts = np.stack([_starts(losses, GRID)]).reshape(num_sets, len(GRID), NUM_COEFFICIENTS)
    once = np.ones((num_sets, len(GRID), num_runs))
    best = _best(starts, x, y, logs, once, delta)
    weights = np.random.default_rng(seed).exponential(size=(num_sets, num_draws, 1, num_runs))
    again = np.concatenate([best[:, None], _starts(losses, DRAW_GRID)], axis=1)
    kinds = again.shape[1]
    draws = np.empty((num_sets, num_draws, NUM_COEFFICIENTS))
    if num_draws:
        shape = (num_sets * num_draws, kinds)
        draws = _best(
            np.repeat(again, num_draws, axis=0).reshape(*shape, NUM_COEFFICIENTS),
            x,
            y,
            np.repeat(logs, num_draws, axis=0),
            np.broadcast_to(weights, (num_sets, num_draws, kinds, num_runs)).reshape(
                *shape, num_runs
            ),
            delta,
        ).reshape(num_sets, num_draws, NUM_COEFFICIENTS)
    for found in (best, draws):
        found[..., :2] += found[..., 3:] * middle
    return best, draws


def interval_of(
    log_losses: Floats, residuals: Floats, *, level: float = 0.9, seed: int = 0
) -> Floats:
    """(sets, 2) losses between which one more run lies with this probability.

    Residuals are as many degrees of freedom too small as coefficients were fitted.

    Args:
        log_losses: (sets, draws) of the law's draws.
        residuals: (sets, runs).
    """
    num_runs = residuals.shape[1]
    scale = np.sqrt(num_runs / max(1, num_runs - NUM_COEFFICIENTS))
    rng = np.random.default_rng(seed)
    noise = rng.permuted(np.resize(residuals.T, (log_losses.shape[1], len(residuals))).T, axis=1)
    ends = [(1 - level) / 2, (1 + level) / 2]
    return np.exp(np.quantile(log_losses + scale * noise, ends, axis=1)).T


def _law(found: Floats) -> Law:
    a, b, e, alpha, beta = map(float, found)
    return Law(E=_exp(e), log_A=a, log_B=b, alpha=alpha, beta=beta)


def _exp(value: float) -> float:
    """exp, at most 1e304 and never 0: numbers whose logarithms and sums are numbers too."""
    return math.exp(max(-700.0, min(700.0, value)))


def _starts(losses: Floats, grid: tuple[tuple[float, float, float, float], ...]) -> Floats:
    """(sets, starts, 5) places to begin at, around the runs' mean."""
    part, share, alpha, beta = np.array(grid).T
    ends = part * losses.min(axis=1)[:, None]
    above = losses.mean(axis=1)[:, None] - ends
    rows = [np.log(above * share), np.log(above * (1 - share)), np.log(ends)]
    rows += [np.broadcast_to(exponent, ends.shape) for exponent in (alpha, beta)]
    return np.stack(rows, axis=-1)


def _best(
    starts: Floats, x: Floats, y: Floats, logs: Floats, weights: Floats, delta: float
) -> Floats:
    """(problems, 5) the best that is reached from any start.

    Args:
        starts: (problems, starts, 5).
        x, y: (runs,) log N and log D.
        logs: (problems, runs) log losses.
        weights: (problems, starts, runs).
    """
    num_problems, num_starts, _ = starts.shape
    found, values = _minimise(
        starts.reshape(-1, NUM_COEFFICIENTS),
        x,
        y,
        np.repeat(logs, num_starts, axis=0),
        weights.reshape(-1, len(x)),
        delta,
    )
    best = values.reshape(num_problems, num_starts).argmin(axis=1)
    return found.reshape(starts.shape)[np.arange(num_problems), best]


def _objective(
    theta: Floats, x: Floats, y: Floats, logs: Floats, weights: Floats, delta: float
) -> tuple[Floats, Floats]:
    """(problems,) sums of Huber's loss over the runs, and (problems, 5) their gradients."""
    a, b, e, alpha, beta = theta.T[:, :, None]
    terms = np.stack([a - alpha * x, b - beta * y, e + np.zeros_like(x)])
    top = terms.max(axis=0)
    shares = np.exp(terms - top)
    total = shares.sum(axis=0)
    shares /= total
    errors = top + np.log(total) - logs
    sizes = np.abs(errors)
    values = np.where(sizes < delta, errors**2 / (2 * delta), sizes - delta / 2)
    slopes = weights * np.clip(errors / delta, -1, 1)
    of_a, of_b, of_e = slopes * shares
    columns = [of_a, of_b, of_e, -of_a * x, -of_b * y]
    return (weights * values).sum(axis=1), np.stack([c.sum(axis=1) for c in columns], axis=1)


def _minimise(
    theta: Floats, x: Floats, y: Floats, logs: Floats, weights: Floats, delta: float
) -> tuple[Floats, Floats]:
    """Where each problem's objective is least, and that least; BFGS, all problems side by side.

    BFGS is what L-BFGS limits the memory of, and five coefficients need no limit. A problem that
    has ended is taken out, so that few long ones do not cost what all did.
    """
    theta = theta.copy()
    values, slopes = _objective(theta, x, y, logs, weights, delta)
    active = np.arange(len(theta))
    inverse = np.tile(np.eye(NUM_COEFFICIENTS), (len(theta), 1, 1))
    idle = np.zeros(len(theta), int)
    for _ in range(MOST_STEPS):
        data = (x, y, logs[active], weights[active], delta)
        moves, new_values, new_slopes = _step(
            theta[active], values[active], slopes[active], inverse[active], data
        )
        gains = values[active] - new_values
        idle[active] = np.where(gains > LEAST_GAIN * values[active], 0, idle[active] + 1)
        inverse[active] = _updated(inverse[active], moves, new_slopes - slopes[active])
        theta[active] += moves
        values[active], slopes[active] = new_values, new_slopes
        active = active[idle[active] < PATIENCE]
        if not len(active):
            break
    return theta, values


def _step(
    theta: Floats, values: Floats, slopes: Floats, inverse: Floats, data: tuple
) -> tuple[Floats, Floats, Floats]:
    """One step each: where it goes, and the objective and its gradient there.

    Halved until the objective falls by a part of what its slope promises (Armijo); a step that
    never does is none. No step is longer than 1: an exponential far away says nothing.
    """
    towards = -np.einsum("bij,bj->bi", inverse, slopes)
    downhill = np.einsum("bi,bi->b", towards, slopes)
    is_up = downhill >= 0
    towards[is_up] = -slopes[is_up]
    downhill[is_up] = -(slopes[is_up] ** 2).sum(axis=1)
    towards /= np.maximum(1.0, np.abs(towards).max(axis=1))[:, None]
    downhill = np.einsum("bi,bi->b", towards, slopes)
    moves, new_values, new_slopes = np.zeros_like(theta), values.copy(), slopes.copy()
    waiting, length = np.arange(len(theta)), 1.0
    x, y, logs, weights, delta = data
    for _ in range(20):
        tried = length * towards[waiting]
        there, there_slopes = _objective(
            theta[waiting] + tried, x, y, logs[waiting], weights[waiting], delta
        )
        is_good = there <= values[waiting] + 1e-4 * length * downhill[waiting]
        good = waiting[is_good]
        moves[good], new_values[good] = tried[is_good], there[is_good]
        new_slopes[good] = there_slopes[is_good]
        waiting, length = waiting[~is_good], length / 2.5
        if not len(waiting):
            break
    return moves, new_values, new_slopes


def _updated(inverse: Floats, moves: Floats, changes: Floats) -> Floats:
    """BFGS's inverse Hessian after a step; begun anew where the step found no curvature."""
    product_ = np.einsum("bi,bi->b", moves, changes)
    is_curved = product_ > 1e-14
    rho = 1 / np.where(is_curved, product_, 1.0)
    eye = np.eye(NUM_COEFFICIENTS)
    left = eye - rho[:, None, None] * moves[:, :, None] * changes[:, None, :]
    new = left @ inverse @ left.transpose(0, 2, 1)
    new += rho[:, None, None] * moves[:, :, None] * moves[:, None, :]
    return np.where(is_curved[:, None, None], new, eye)
