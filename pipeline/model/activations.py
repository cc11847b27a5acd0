"""What stands between the two matrices of an MLP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from pipeline.config.choices import Activation


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al. 2021, arXiv:2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.gelu: F.gelu,
    Activation.gelu_tanh: partial(F.gelu, approximate="tanh"),
    Activation.swiglu: F.silu,  # of the gate
    Activation.squared_relu: squared_relu,
}


def activate(wide: Tensor, act: Callable[[Tensor], Tensor], *, is_gated: bool) -> Tensor:
    """What an MLP's second matrix takes: act(wide); of a gated one act(gate) * up, its halves.

    Args:
        wide: (..., F), or (..., 2 F) of a gated one.
    """
    if not is_gated:
        return act(wide)
    gate, up = wide.chunk(2, dim=-1)
    return act(gate) * up
