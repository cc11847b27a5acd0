"""A linear's three products, where they are not torch's and megatron-core's own.

    y = x W^T        forward
    dx = dy W        backward: another rank may wait for it
    dW = dy^T x      backward: nobody waits for it before the step ends

In a pipeline dx is what the stage before waits for. With `late` a backward pass computes dx only
and notes the rest; the list is worked off once dx is on its way (engine/deepspeed/staged.py; Qi et
al. 2023, arXiv:2401.10241, for schedules that need two passes of their own). In `fp8` the first two
are products of float8 numbers (float8.py). Plain linears outside pipelines never come here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from pipeline.model import float8


@dataclass
class LateProducts:
    """Weight gradients of a stage that wait until the input's gradient is on its way."""

    _waiting: deque[tuple[Tensor, Tensor, _Plan]] = field(default_factory=deque)

    def __len__(self) -> int:
        """Products that wait."""
        return len(self._waiting)

    def add(self, x: Tensor, gradient: Tensor, plan: _Plan) -> None:
        """A product for later; its factors must not be written to until then."""
        # Detached: they are parts of a graph that has been walked, and must not be walked again.
        self._waiting.append((x.detach(), gradient.detach(), plan))

    def work_off(self) -> None:
        """Compute all that wait.

        Collective under sequence parallelism: call on every tensor-parallel rank.
        """
        while self._waiting:
            # By autograd, so that every hook of the weight hears of its gradient.
            x, gradient, plan = self._waiting.popleft()
            _WeightGradient.apply(plan.weight, x, gradient, plan).backward()


@dataclass(frozen=True)
class _Plan:
    """How a linear computes and with whom it talks."""

    weight: nn.Parameter
    """(rows, columns)."""
    group: dist.ProcessGroup | None
    """Tensor-parallel ranks of a column-parallel linear; None: nothing to exchange here."""
    gathers: bool
    """x is this rank's slice of the sequence."""
    late: LateProducts | None
    is_float8: bool

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """X W^T."""
        return float8.product(x, weight) if self.is_float8 else torch.matmul(x, weight.t())

    def multiply_back(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """Dy W."""
        if self.is_float8:
            return float8.product(gradient, weight.t().contiguous())
        return gradient.matmul(weight)

    def whole(self, x: Tensor) -> Tensor:
        """X of all positions, the first dimension."""
        if not self.gathers:
            return x
        assert self.group is not None
        out = x.new_empty(x.shape[0] * self.group.size(), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=self.group)
        return out

    def reduced(self, gradient: Tensor) -> Tensor:
        """The ranks' sum of dx, laid out as x."""
        if self.group is None:
            return gradient
        gradient = gradient.contiguous()
        if not self.gathers:
            dist.all_reduce(gradient, group=self.group)
            return gradient
        out = gradient.new_empty(gradient.shape[0] // self.group.size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(out, gradient, group=self.group)
        return out


def multiply(
    x: Tensor,
    weight: nn.Parameter,
    *,
    group: dist.ProcessGroup | None = None,
    gathers: bool = False,
    late: LateProducts | None = None,
    is_float8: bool = False,
) -> Tensor:
    """X W^T (..., rows), x: (..., columns).

    Args:
        weight: (rows, columns); frozen ones get no gradient.
        group: the ranks over which dx is summed; None: this rank has all of it.
        gathers: x is this rank's slice of the first dimension, and so is dx; the result is whole.
        late: where the gradient of the weight is left to; None: it comes at once.
        is_float8: y and dx are products of float8 numbers, in bf16; dW is one of bf16.
    """
    if not x.requires_grad:
        late = None  # nobody waits for dx, and the function below would have no gradient to give
    plan = _Plan(weight, group, gathers, late if weight.requires_grad else None, is_float8)
    # Where dW comes late, autograd must not know of the weight: it would be told of no gradient.
    return _Product.apply(x, weight if plan.late is None else weight.detach(), plan)


class _Product(Function):
    """X W^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, plan: _Plan) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.plan = plan
        return plan.multiply(plan.whole(x), weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x, weight), plan = ctx.saved_tensors, ctx.plan
        dx = plan.reduced(plan.multiply_back(gradient, weight)) if ctx.needs_input_grad[0] else None
        dw = None
        if plan.late is not None:
            plan.late.add(x, gradient, plan)
        elif ctx.needs_input_grad[1]:
            dw = _weight_gradient(gradient, plan.whole(x))
        return dx, dw, None


class _WeightGradient(Function):
    """A scalar of no meaning, whose gradient with respect to the weight is dW."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, gradient: Tensor, plan: _Plan) -> Tensor:
        ctx.factors = x, gradient, plan
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        x, gradient, plan = ctx.factors
        return _weight_gradient(gradient, plan.whole(x)), None, None, None


def _weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """dy^T x over all tokens."""
    return gradient.flatten(0, -2).t().matmul(x.flatten(0, -2))
