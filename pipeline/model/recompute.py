"""Activation checkpointing that replays the random streams of the forward pass."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.utils.checkpoint import checkpoint as torch_checkpoint


def recompute(function: Any, *args: Any) -> Any:
    """function(*args), recomputed in the backward pass under the forward pass's random streams.

    torch's own checkpoint restores the default generator but not megatron-core's tracked streams,
    which gives wrong dropout masks.
    """
    tracker = get_cuda_rng_tracker()
    at_forward = {name: state.clone() for name, state in tracker.get_states().items()}
    is_replay = False

    def run(*inputs: Any) -> Any:
        """The forward pass as it comes; the replay on the streams as they were before it."""
        nonlocal is_replay
        if not is_replay:
            is_replay = True
            return function(*inputs)
        now = tracker.get_states()
        tracker.set_states(dict(at_forward))  # a copy: drawing replaces the entries
        try:
            return function(*inputs)
        finally:
            tracker.set_states(now)

    return torch_checkpoint(run, *args, use_reentrant=False)
