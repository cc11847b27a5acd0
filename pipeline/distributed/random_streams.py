"""The dropout streams of a step: a function of seed, step and place, so none is saved."""

from __future__ import annotations

import zlib

from pipeline.distributed.layout import ParallelLayout


def seed_step(seed: int, step: int, layout: ParallelLayout, *, micro_batch: int = 0) -> None:
    """Set the dropout streams for one optimizer step.

    Copies of the model compute other tokens and draw other masks; of one copy, tensor-parallel
    peers share the default stream (they hold the same activations) and differ in
    the tracked one (their heads, or their slice of the sequence, are different ones).
    """
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    place = (seed, step, micro_batch, layout.replica.rank, layout.pipeline.rank)
    torch.default_generator.manual_seed(_hash(*place))  # torch.manual_seed costs a stack trace here
    if layout.device.type == "cuda":
        torch.cuda.manual_seed(_hash(*place))
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("model-parallel-rng", _hash(*place, 1 + layout.tensor.rank))


def _hash(*numbers: int) -> int:
    """A seed below 2^31 from a tuple of integers, the same on every machine."""
    return zlib.crc32(repr(numbers).encode()) & 0x7FFFFFFF
