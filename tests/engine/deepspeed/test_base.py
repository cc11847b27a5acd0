"""What tensor-parallel ranks hold parts of is summed once a step, at every ZeRO stage and precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from tests.engine.test_engine import engine_of
from tests.support.equivalence import Case
from tests.support.layouts import (
    allow_fp16_on_the_cpu,
    batches,
    config,
    rank_batches,
    reset_parallel_state,
)
from tests.support.ranks import run_on_ranks

STAGES = {"fp32": (0, 1, 2, 3), "bf16": (1, 2, 3), "fp16": (1, 2, 3)}
CASES: list[Case] = [
    dict(zero=stage, precision=precision) for precision, found in STAGES.items() for stage in found
]
CASES += [dict(pp=2, precision=precision) for precision in STAGES]
SHARES = {"first": CASES[:1], "others": CASES[1:]}  # the first one proves a change, again and again
NO_PARTS = "*.linear_*.weight embedding.*"  # norms and biases are frozen


def all_reduces(cases: list[Case]) -> list[int]:
    """Over the tensor-parallel ranks, in the second step of each."""
    allow_fp16_on_the_cpu()
    count: list[Any] = []
    group: Any = None  # of the engine that is counted
    all_reduce = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("group") is group:
            count.append(args)
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted
    found = []
    for case in cases:
        engine = engine_of(config("gpt2", tp=2, sp=True, **case))
        group = engine.layout.tensor.group
        for number, step in enumerate(batches()[:2]):
            count.clear()
            engine.train_step(rank_batches(step, engine.shape, engine.layout), step=number)
        found.append(len(count))
        reset_parallel_state()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
def test_parts_of_gradients_are_summed_in_one_all_reduce_a_step(share: str) -> None:
    """It was one for each norm, bias and micro-batch, for which the backward pass waits."""
    cases = [dict(case, train=train) for case in SHARES[share] for train in ("*", NO_PARTS)]
    for found in run_on_ranks(all_reduces, 4, cases):
        more = [whole - frozen for whole, frozen in zip(found[::2], found[1::2])]
        assert more == [1] * len(more), list(zip(more, SHARES[share]))
