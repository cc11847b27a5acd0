"""Seconds of an update against numbers worked out by hand."""

from __future__ import annotations

import pytest

from pipeline.planning import update_time
from tests.planning.test_step_time import H100, job_of


def test_muon_adds_its_products_shared_by_the_ranks_of_a_stage():
    """6.7B: q, k, v, projection are square; fc1, fc2 four times as long: 5 (4 n^2 m + 2 n^3) each."""
    square, long = 5 * (4 + 2) * 4096**3, 5 * (4 * 4 + 2) * 4096**3
    expected = 32 * (4 * square + 2 * long) / 8 / (H100.peak * H100.matrix_share)
    job = job_of("optimizer=muon")
    (stage,) = job.stages
    found = update_time._muon_seconds(job, H100, stage, copies=8)
    sent = 2 * stage.by_muon / 8 * 2 / (450e9 * 0.75)
    assert found == pytest.approx(expected + sent)
    # However many ranks: the dearest weight, q, k and v in one, is worked on by one of them.
    many = job_of("optimizer=muon", "training.global_batch_size=8192", world_size=4096)
    alone = max(3 * square, long) / (H100.peak * H100.matrix_share)
    assert update_time._muon_seconds(many, H100, many.stages[0], copies=4096) >= alone
    assert update_time.update_seconds(job, H100, stage) > update_time.update_seconds(
        job_of(), H100, job_of().stages[0]
    )
