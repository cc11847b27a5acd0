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
