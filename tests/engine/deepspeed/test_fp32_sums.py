"""ZeRO-1 in fp32: gradients lie where the update reads them; no number changes, and no reduction waits for the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from tests.engine.deepspeed.test_bf16_sums import LargeOps, history_of
from tests.engine.test_engine import engine_of
from tests.support.layouts import batches, config, rank_batches, reset_parallel_state
from tests.support.ranks import run_on_ranks


def histories(skips: bool) -> list[list[tuple[float, float]]]:
    """The same run with our sums and with DeepSpeed's own."""
    from pipeline.engine.deepspeed import fp32_sums, reduction

    reduction.BUCKET_ELEMENTS = 10_000  # several buckets
    ours, changed, found = fp32_sums.sum_in_place, [], []
    for change in (lambda *a: changed.append(ours(*a)), lambda *_: None):
        fp32_sums.sum_in_place = change
        found.append(history_of(config("gpt2", micro_batch_size=2), skips))
    assert len(changed) == 1
    return found


@pytest.mark.parametrize(
    ("ranks", "skips"),
    [
        pytest.param(2, False, id="all used"),
        pytest.param(4, True, id="a layer passed by", marks=pytest.mark.slow),
    ],
)
def test_losses_and_norms_are_deepspeeds_own(ranks: int, skips: bool) -> None:
    """Of two ranks bit by bit; of more DeepSpeed divides before it adds, and rounds otherwise."""
    for found, expected in run_on_ranks(histories, ranks, skips):
        if ranks == 2:
            assert found == expected
        else:
            assert [x for pair in found for x in pair] == pytest.approx(
                [x for pair in expected for x in pair], rel=1e-6
            )


def large_ops() -> tuple[set[str], set[str]]:
    """Operators on a quarter of the weights or more in a step of ours, and of DeepSpeed's own."""
    from pipeline.engine.deepspeed import fp32_sums

    ours, found = fp32_sums.sum_in_place, []
    for change in (ours, lambda *_: None):
        fp32_sums.sum_in_place = change
        engine = engine_of(config("gpt2", micro_batch_size=2))
        for number, step in enumerate(batches()[:2]):
            parts = rank_batches(step, engine.shape, engine.layout)
            with LargeOps(sum(p.numel() for p in engine.runner.parameters) // 4) as ops:
                engine.train_step(parts, step=number)
        reset_parallel_state()
        found.append(set(ops.found))
    return found[0], found[1]


def test_gradients_are_not_gathered_before_the_update() -> None:
    """Neither reduced parts nor the update's flat gradient are put together from copies."""
    for ours, theirs in run_on_ranks(large_ops, 2):
        assert not {"aten::cat", "aten::flatten_dense_tensors"} & ours, ours
        assert {"aten::cat", "aten::flatten_dense_tensors"} & theirs, "the watch sees nothing"


def events() -> list[str]:
    """What happens in a step: a part is reduced to its owner, or the gradient of a parameter arrives."""
    from pipeline.engine.deepspeed import reduction

    reduction.BUCKET_ELEMENTS = 10_000
    engine = engine_of(config("gpt2", micro_batch_size=2))
    found: list[str] = []
    for name, parameter in engine.runner.module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: found.append(name))
    reduce, all_reduce = dist.reduce, dist.all_reduce

    def recorded(*args: Any, **kwargs: Any) -> Any:
        found.append("reduce")
        return reduce(*args, **kwargs)

    def refused(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        assert tensor.numel() <= 1000, "all ranks get what one of them needs"
        return all_reduce(tensor, *args, **kwargs)

    dist.reduce, dist.all_reduce = recorded, refused
    engine.train_step(rank_batches(batches()[0], engine.shape, engine.layout), step=0)
    dist.reduce, dist.all_reduce = reduce, all_reduce
    return found


def test_gradients_are_reduced_to_their_owners_while_the_backward_pass_goes_on() -> None:
    """The last layer's are on their way before the first layer's are there; earlier micro-batches reduce nothing."""
    for found in run_on_ranks(events, 2):
        names = [name for name in found if name != "reduce"]
        per_micro_batch = names.index("embedding.word.weight", 1) + 1
        assert len(names) == 4 * per_micro_batch
        last = len(found) - 1 - found[::-1].index("embedding.word.weight")
        before = [i for i, event in enumerate(found[:last]) if event == "reduce"]
        assert found.count("reduce") - len(before) <= 3
        assert len(before) >= 10 and min(before) >= 3 * per_micro_batch, "not the last micro-batch"
