"""All experts of a rank in one product: y = x W_e^T where expert e's tokens lie in x.

A loop over experts launches their products one after another; of many small experts each is too
small to fill a GPU, and the host is slower than they are. torch's grouped product takes them at
once, from weights at equal distances in one memory, as ZeRO 1 and 2 lay them: nothing is stacked or
copied. Where it does not go (the CPU, other precisions, ZeRO-3's scattered weights) the loop stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import grouped_mm

ALIGNMENT = 16  # bytes, at which the kernel begins to read a row
MOST = 1024  # groups: a thread for each


def goes(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether torch's kernel takes these tokens and weights: NVIDIA since Ampere, bf16.

    Args:
        x: (N, columns).
        weights: (rows, columns) of each expert.
    """
    return (
        x.is_cuda
        and torch.version.hip is None
        and x.dtype is torch.bfloat16
        and 1 < len(weights) <= MOST
        and len(x) > 0
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and lie_regularly(weights)
    )


def lie_regularly(weights: Sequence[Tensor]) -> bool:
    """Whether they are whole, alike, aligned and at equal distances in one memory."""
    first = weights[0]
    per_row = ALIGNMENT // first.element_size()
    if hasattr(first, "ds_tensor") or first.dim() != 2 or any(n % per_row for n in first.shape):
        return False
    memory, starts = first.untyped_storage()._cdata, [w.storage_offset() for w in weights]
    distance = starts[1] - starts[0]
    return (
        distance >= first.numel()
        and not (distance % per_row or starts[0] % per_row)
        and starts == list(range(starts[0], starts[0] + distance * len(starts), distance))
        and all(
            w.shape == first.shape
            and w.dtype is first.dtype
            and w.is_contiguous()
            and w.untyped_storage()._cdata == memory
            for w in weights
        )
    )


def grouped_product(x: Tensor, ends: Tensor, weights: Sequence[nn.Parameter]) -> Tensor:
    """(N, rows): each token by its expert's weight.

    Args:
        x: (N, columns), sorted by expert.
        ends: (experts,) int32 on x's device: where each expert's tokens end; the last is N.
        weights: (rows, columns) of each, as `lie_regularly`.
    """
    return _GroupedProduct.apply(x, ends, *weights)


class _GroupedProduct(Function):
    """X W_e^T; dx = dy W_e, dW_e = dy_e^T x_e."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, ends, *weights)
        return grouped_mm(x, _as_one(weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, ends, *weights = ctx.saved_tensors
        gradient = gradient.contiguous()
        dx: Tensor | None = None
        dw: Sequence[Tensor | None] = [None] * len(weights)
        if ctx.needs_input_grad[0]:
            dx = grouped_mm(gradient, _as_one(weights), offs=ends)
        if any(ctx.needs_input_grad[2:]):
            # The factors lie so that an expert's tokens may be any number, also none.
            dw = grouped_mm(gradient.t(), x, offs=ends).unbind()
        return dx, None, *dw


def _as_one(weights: Sequence[Tensor]) -> Tensor:
    """(experts, rows, columns): a view."""
    first, second = weights[:2]
    distance = second.storage_offset() - first.storage_offset()
    return first.as_strided((len(weights), *first.shape), (distance, *first.stride()))
