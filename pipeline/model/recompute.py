"""Activation checkpointing that replays the random streams of the forward pass."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.utils.checkpoint import checkpoint as torch_checkpoint

_num_replays = 0


def is_replay() -> bool:
    """Whether a forward pass is being repeated, whose first run has left its marks already."""
    return _num_replays > 0


def recompute(function: Any, *args: Any) -> Any:
    """function(*args), recomputed in the backward pass under the forward pass's random streams.

    torch's own checkpoint restores the default generator but not megatron-core's tracked streams,
    which gives wrong dropout masks.
    """
    tracker = get_cuda_rng_tracker()
    at_forward = {name: state.clone() for name, state in tracker.get_states().items()}
    has_run = False

    def run(*inputs: Any) -> Any:
        """The forward pass as it comes; the replay on the streams as they were before it."""
        global _num_replays
        nonlocal has_run
        if not has_run:
            has_run = True
            return function(*inputs)
        now = tracker.get_states()
        tracker.set_states(dict(at_forward))  # a copy: drawing replaces the entries
        _num_replays += 1
        try:
            return function(*inputs)
        finally:
            _num_replays -= 1
            tracker.set_states(now)

    return torch_checkpoint(run, *args, use_reentrant=False)
