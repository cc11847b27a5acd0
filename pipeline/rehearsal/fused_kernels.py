"""Operators that CUDA has a kernel for and a CPU build of torch takes apart.

Taken apart, RMSNorm keeps an fp32 copy of its input and of its result, and the gradient of SiLU
makes four temporaries instead of one: what no device would hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.rehearsal.fake_cuda import set_all

if TYPE_CHECKING:
    from torch import Tensor


def stand_in_for_fused_kernels() -> None:
    """Let rms_norm and silu keep and make what their kernels do; before anything imports them.

    Source: torch's derivatives.yaml: _fused_rms_norm keeps input, weight and the reciprocal
    deviation, silu its input.
    """
    import torch
    import torch.nn.functional as F

    class RmsNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            deviation = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
            ctx.save_for_backward(x, weight, deviation)
            return x.new_empty(x.shape)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
            x, weight, _ = ctx.saved_tensors
            return x.new_empty(x.shape), torch.empty_like(weight)

    class Silu(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.new_empty(x.shape)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0].new_empty(grads[0].shape)

    def rms_norm(x: Tensor, _: Sequence[int], weight: Tensor, eps: float | None = None) -> Tensor:
        found: Any = RmsNorm.apply(x, weight)
        return found

    def silu(x: Tensor) -> Tensor:
        found: Any = Silu.apply(x)
        return found

    set_all(F, rms_norm=rms_norm, silu=silu)
