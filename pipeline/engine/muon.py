"""Muon: the momentum of a matrix, made orthogonal, is its update (Jordan et al. 2024).

    gradient -> momentum, Nesterov's -> whole at its home rank -> 5 Newton-Schulz steps -> update

For the matrices of the blocks' linears, each by itself: queries, keys and values, gate and up.
Everything else (embeddings, head, router, norms, biases, low-rank matrices) has AdamW. Momentum and
update are scaled, decayed and left out as AdamW's kernel does it, on the device. A matrix's state
is 4 bytes a weight, and lies where its weights lie.

Sources: kellerjordan.github.io/posts/muon (the coefficients); Liu et al. 2025, arXiv:2502.16982,
section 2.2 (the update's size: AdamW's, so that both share learning rate and decay).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.config.model import ModelConfig
from pipeline.config.parameter_names import matrices_of
from pipeline.distributed.layout import Axis
from pipeline.engine.home_ranks import HomeRanks, Run
from pipeline.planning.flops import NEWTON_SCHULZ_STEPS, orthogonalization_flops

# Of x -> a x + b x^3 + c x^5, which five times over takes every singular value of (0.01, 1] into
# (0.68, 1.14): steepest at 0, where small ones must grow fast, at the price of not ending in 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Root mean square of AdamW's updates, with which Muon's share learning rate and decay.
ADAMW_RMS = 0.2
MOMENTUM = "momentum_buffer"
"""Its state, by the name it has in checkpoints."""


def orthogonalize(matrix: Tensor) -> Tensor:
    """The nearest matrix (about) of orthonormal rows or columns, in the precision of `matrix`."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix  # the smaller product
    x = x / (x.norm() + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


def update_of(name: str, momentum: Tensor, model: ModelConfig) -> Tensor:
    """What is taken off the weight of a linear, over the learning rate.

    An orthonormal (m, n) matrix has elements of size 1 / sqrt(max(m, n)).

    Args:
        name: canonical, of the weight.
        momentum: (rows, columns), whole.
    """
    update = torch.empty_like(momentum)
    for runs in matrices_of(name, len(momentum), model):
        one = torch.cat([momentum[start:stop] for start, stop in runs])
        one = orthogonalize(one) * (ADAMW_RMS * math.sqrt(max(one.shape)))
        for (start, stop), part in zip(runs, one.split([b - a for a, b in runs])):
            update[start:stop] = part
    return update


class Muon(torch.optim.AdamW):
    """Muon for the groups marked `is_matrix`, torch's fused AdamW for the others."""

    grad_scale: Tensor | None
    found_inf: Tensor

    def __init__(
        self, groups: list[dict[str, Any]], *, momentum: float, dtype: torch.dtype, **adamw: Any
    ) -> None:
        """Ready for `join`.

        Args:
            groups: of parameters (engine/optimizer.py).
            momentum: of the matrices.
            dtype: in which a matrix travels and is made orthogonal.
            adamw: settings of torch's AdamW.
        """
        super().__init__(groups, fused=True, **adamw)
        self.momentum, self.dtype = momentum, dtype

    def join(
        self, runs: list[Run], peers: Axis, *, flats: list[Tensor], model: ModelConfig
    ) -> None:
        """Learn who holds which matrices. Collective: call on every rank of `peers`.

        Args:
            runs: of the weights of linears that this rank updates.
            peers: the ranks that share this stage's matrices and their updates.
            flats: the tensors that a step is asked to update, in the order that Run.flat counts.
        """
        self._model = model
        self._number = {id(flat): number for number, flat in enumerate(flats)}
        self._homes = HomeRanks(runs, peers, cost=partial(orthogonalization_flops, model=model))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update, unless found_inf is 1. Collective: call on every rank of a stage."""
        everything = self.param_groups
        self.param_groups = [group for group in everything if not group["is_matrix"]]
        try:
            super().step()
        finally:
            self.param_groups = everything
        matrices = [(p, g) for g in everything if g["is_matrix"] for p in g["params"]]
        if matrices:
            self._update(matrices)

    def _update(self, matrices: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """One step of flat tensors that are all matrices."""
        applied = 1.0 - self.found_inf
        moved = {self._number[id(flat)]: self._momentum(flat, applied) for flat, _ in matrices}
        updates = self._homes.map(lambda name, m: update_of(name, m, self._model), moved)
        for flat, group in matrices:
            rate = group["lr"] * applied
            flat.mul_(1.0 - rate * group["weight_decay"])
            flat.sub_(updates[self._number[id(flat)]].view_as(flat) * rate)

    def _momentum(self, flat: Tensor, applied: Tensor) -> Tensor:
        """Gradient + momentum * (what the state is after this step), flat, as it will travel.

        A step that is left out has gradients that are not numbers: it leaves the state as it was.
        """
        state = self.state[flat]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(flat, dtype=torch.float32)
            state.setdefault("step", torch.zeros((), device=flat.device))
        # None: at ZeRO-0 an expert that no token went to.
        gradient = torch.zeros_like(flat) if flat.grad is None else flat.grad
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        gradient = torch.where(applied > 0, gradient, 0.0)
        held = state[MOMENTUM]
        held.mul_(torch.where(applied > 0, self.momentum, 1.0)).add_(gradient)
        state["step"] += applied
        return gradient.add(held, alpha=self.momentum).view(-1).to(self.dtype)
