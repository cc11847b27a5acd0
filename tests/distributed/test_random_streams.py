"""Who draws which dropout masks: a function of seed, step and place, asked of fake layouts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.support.ranks import run_on_ranks

Drawn = dict[str, list[int]]
CONTEXT = 2


def place(*, tensor: int = 0, context: int = 0, data: int = 0, pipeline: int = 0) -> Any:
    """A rank of TP2 x CP2 x DP2 x PP2, as far as seeds ask."""
    import torch

    ranks = dict(tensor=tensor, context=context, data=data, pipeline=pipeline)
    ranks["replica"] = CONTEXT * data + context
    axes = {name: SimpleNamespace(rank=rank, size=2) for name, rank in ranks.items()}
    return SimpleNamespace(**axes, device=torch.device("cpu"))


def drawn(*steps: int, micro_batch: int = 0, seed: int = 1, **where: int) -> Drawn:
    """Numbers of the stream that tensor-parallel peers share, and of their own, step after step."""
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from pipeline.distributed.random_streams import seed_step

    found: Drawn = {"shared": [], "own": []}
    for step in steps or (3,):
        seed_step(seed, step, place(**where), micro_batch=micro_batch)
        found["shared"] += torch.randint(2**31, (4,)).tolist()
        with get_cuda_rng_tracker().fork():
            found["own"] += torch.randint(2**31, (4,)).tolist()
    return found


def draws_of_places() -> dict[str, Drawn]:
    """What ranks that differ in one thing draw."""
    from pipeline.distributed.megatron_on_cpu import install

    install()
    return {
        "first": drawn(), "again": drawn(), "data": drawn(data=1), "context": drawn(context=1),
        "both": drawn(data=1, context=1), "pipeline": drawn(pipeline=1), "tensor": drawn(tensor=1),
        "seed": drawn(seed=2), "step": drawn(4), "micro-batch": drawn(micro_batch=1),
        "after others": {name: numbers[-4:] for name, numbers in drawn(1, 2, 3).items()},
    }  # fmt: skip


def test_copies_draw_apart_and_tensor_parallel_peers_share_one_stream() -> None:
    """Peers hold the same activations outside their heads: other masks there would make two models of one.

    Ranks that share sequences hold other tokens of them, and other heads in attention: they are copies as
    data-parallel ranks are. Nothing of a step is left to the next, so that a resumed run draws the same.
    """
    (found,) = run_on_ranks(draws_of_places, 1)
    first, tensor = found.pop("first"), found.pop("tensor")
    assert found.pop("again") == found.pop("after others") == first
    assert tensor["shared"] == first["shared"] and tensor["own"] != first["own"]
    for stream in ("shared", "own"):
        streams = [first, *found.values()]
        different = {tuple(drawn[stream]) for drawn in streams}
        assert len(different) == len(streams), (stream, streams)
    assert not set(first["shared"]) & {*first["own"], *tensor["own"]}
