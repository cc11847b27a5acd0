"""Layouts that the search offers: legal, fitting, no slower than what was set."""

from __future__ import annotations

import time

import pytest

from pipeline.planning.devices import load_device
from pipeline.planning.search import search
from tests.support.planned_run import run_of

H100 = load_device("h100")


def found_by(cfg, shape):
    return search(cfg, H100, world_size=shape.world_size, vocab_size=shape.vocab_size)


@pytest.mark.parametrize(
    "words",
    [("training.micro_batch_size=8",), ("training.micro_batch_size=4", "parallel=tp8")],
    ids=["too large", "tp8"],
)
def test_the_winner_is_legal_fits_and_is_never_slower_than_what_was_set(words):
    words = [*words, "training.global_batch_size=512"]
    cfg, shape = run_of(*words, world_size=64)
    found, count = found_by(cfg, shape)
    assert len(found) < count
    rates = [layout.plan.tokens_per_s for layout in found]
    assert rates == sorted(rates, reverse=True)
    best = found[0]
    changed, changed_shape = run_of(*words, *best.settings.split(), world_size=64)
    assert changed_shape == best.plan.job.shape and best.plan.fits
    as_set = [layout for layout in found if not layout.settings]
    assert all(best.plan.tokens_per_s >= layout.plan.tokens_per_s for layout in as_set)


def test_with_packed_rows_only_what_the_run_would_take_is_legal():
    """A layout was said to be legal whose sequences are no rows of the data."""
    cfg, _ = run_of("training.micro_batch_size=1", "model.num_layers=2")
    given = {"world_size": 2, "vocab_size": 50257}
    assert search(cfg, H100, **given, row_tokens=1024) == ([], 0)
    assert search(cfg, H100, **given, row_tokens=2048)[1] == search(cfg, H100, **given)[1] > 0


def test_a_thousand_devices_take_seconds():
    """CPU time: the promise is 30 s on an idle machine."""
    words = ["experiment=gpt3-175b", "training.global_batch_size=1536", "training.total_steps=null"]
    cfg, shape = run_of(*words, "model.vocab_size=50257", world_size=1024)
    start = time.process_time()
    found, _ = found_by(cfg, shape)
    assert time.process_time() - start < 30
    sizes = {(f.plan.job.shape.sizes.tensor, f.plan.job.shape.sizes.pipeline) for f in found}
    assert len(sizes) > 5 and (8, 16) in sizes


def test_experts_are_offered_the_ranks_that_fit_them():
    words = ["model=mixtral-8x7b", "training.micro_batch_size=1", "training.global_batch_size=128"]
    cfg, shape = run_of(*words, world_size=16)
    found = [layout.plan.job.shape.sizes for layout in found_by(cfg, shape)[0]]
    assert {sizes.expert for sizes in found} == {1, 2, 4, 8}
    for sizes in found:
        assert sizes.expert == 1 or sizes.expert % sizes.tensor == 0
        assert (sizes.tensor * sizes.data) % sizes.expert == 0


def test_every_axis_is_tried():
    words = ["training.micro_batch_size=8", "training.global_batch_size=512"]
    cfg, shape = run_of(*words, world_size=64)
    offered = " ".join(layout.settings for layout in found_by(cfg, shape)[0])
    for axis in ("tensor_parallel_size=2", "pipeline_parallel_size=4", "micro_batch_size=1",
                 "recompute=full", "zero_stage=2", "zero_stage=3", "schedule=dualpipev"):  # fmt: skip
        assert axis in offered, axis
