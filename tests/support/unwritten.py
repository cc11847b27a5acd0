"""Memory that nobody has written to holds NaN: what is read before it is written shows in every result.

torch.empty gives what the allocator has, on a fresh process mostly zeros and small numbers, so that a read of it is right
by chance: the tuned lens was NaN once in five runs of the suite, for rows of a vocabulary that no checkpoint fills.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def with_nan_memory(fn: Callable[..., Any], *args: Any) -> Any:
    """fn(*args) on a rank, whose process ends with it; integers begin as the largest of their type.

    By torch.utils.deterministic.fill_uninitialized_memory, so in torch's own C++ as well, wherever a tensor is made by empty,
    empty_like, new_empty, empty_strided or resize_.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(2).isnan().all() and torch.empty(2).new_empty(3).isnan().all()
    return fn(*args)
