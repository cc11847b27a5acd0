"""What a run needs, takes and costs, in sums worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.planning.devices import load_device
from pipeline.planning.flops import flops_per_token
from pipeline.planning.job import Job
from pipeline.planning.plan import Plan
from tests.support.planned_run import run_of

H100 = load_device("h100")


def plan_of(*settings: str, world_size: int = 8) -> Plan:
    return Plan(Job.of(*run_of(*settings, world_size=world_size)), H100)


def test_speed_and_utilisation_follow_from_the_seconds_of_a_step():
    plan = plan_of("training.micro_batch_size=2")
    assert plan.tokens_per_s == 64 * 2048 / plan.time.total
    model, finetune = plan.job.model, plan.job.finetune
    flops = flops_per_token(model, finetune, vocab_size=50304, seq_len=2048)
    assert plan.mfu == pytest.approx(plan.tokens_per_s / 8 * flops / 989.4e12)
    assert 0.3 < plan.mfu < 0.6


def test_cost_is_hours_times_devices_times_rent():
    plan = plan_of("training.micro_batch_size=2")
    assert plan.hours == pytest.approx(1000 * plan.time.total / 3600)
    assert plan.device_hours == 8 * plan.hours
    dear = replace(plan, device=replace(H100, usd_per_hour=5.0))
    assert dear.usd == pytest.approx(5.0 * plan.device_hours)
    assert plan.megawatt_hours == pytest.approx(plan.device_hours * 700 * 1.3 / 1e6)


def test_a_ramp_is_paid_at_its_own_speed():
    """Half of the run at a quarter of the batch: more than 5 / 8 of the time, less than all of it."""
    words = ["training.micro_batch_size=2"]
    whole = plan_of(*words)
    ramped = plan_of(*words, "training.ramp=[{until_step: 500, global_batch_size: 16}]")
    assert 5 / 8 * whole.hours < ramped.hours < 0.7 * whole.hours


def test_it_fits_or_not_by_the_most_loaded_stage():
    small, large = plan_of("training.micro_batch_size=1"), plan_of("training.micro_batch_size=8")
    assert small.fits and not large.fits
    ends = plan_of("training.micro_batch_size=1", "parallel.pipeline_parallel_size=4")
    assert ends.worst is ends.memory[0]
    assert ends.worst.total == max(memory.total for memory in ends.memory)


def test_a_checkpoint_has_twelve_bytes_a_trained_parameter():
    plan = plan_of("training.micro_batch_size=1")
    assert plan.checkpoint_bytes == 12 * plan.num_parameters == 12 * plan.num_trained
