"""Planned beside measured."""

from __future__ import annotations

import pytest

from pipeline.planning.devices import load_device
from pipeline.planning.job import Job
from pipeline.planning.plan import Plan
from pipeline.tracking.planned import Planned
from tests.support.planned_run import run_of


def test_the_units_are_those_of_the_metrics():
    plan = Plan(Job.of(*run_of("training.micro_batch_size=1")), load_device("h100"))
    planned = Planned.of(plan, step=9)
    assert planned.values() == {
        "plan/step_ms": 1e3 * plan.time.total,
        "plan/tokens_per_sec": plan.tokens_per_s,
        "plan/mfu": plan.mfu,
        "plan/peak_gib": plan.memory[0].tensors / 2**30,
    }


def test_a_step_within_a_ramp_is_planned_as_one():
    """The tenth step of GPT-3's ramp was planned as a step of the whole batch: several times off."""
    words = ["training.micro_batch_size=1"]
    ramp = "training.ramp=[{until_step: 500, global_batch_size: 16}]"
    device = load_device("h100")
    ramped = Plan(Job.of(*run_of(*words, ramp)), device)
    small = Plan(Job.of(*run_of(*words, "training.global_batch_size=16")), device)
    assert Planned.of(ramped, step=9).values() == pytest.approx(Planned.of(small, step=9).values())
    assert Planned.of(ramped, step=500).step_ms == pytest.approx(1e3 * ramped.time.total)
    assert Planned.of(ramped, step=9).step_ms < 0.5 * Planned.of(ramped, step=500).step_ms


def test_utilisation_is_planned_with_the_operations_it_is_measured_with():
    """The trainer counts a token's operations at the full length, also while sequences are short."""
    words = ["training.micro_batch_size=1"]
    ramp = "training.ramp=[{until_step: 500, seq_len: 512}]"
    plan = Plan(Job.of(*run_of(*words, ramp)), load_device("h100"))
    short, full = Planned.of(plan, step=9), Planned.of(plan, step=500)
    assert short.mfu / short.tokens_per_sec == pytest.approx(full.mfu / full.tokens_per_sec)
    assert short.tokens_per_sec != full.tokens_per_sec


def test_both_stand_on_one_line_and_what_is_not_measured_is_left_out():
    planned = Planned(step_ms=100.0, tokens_per_sec=20000.0, mfu=0.5, peak_gib=40.0)
    measured = {
        "throughput/step_ms": 110.0,
        "throughput/tokens_per_sec": 18000.0,
        "throughput/mfu": None,
        "memory/peak_gib": 41.5,
    }
    assert planned.beside(measured) == (
        "plan: step_ms 100.0 planned, 110.0 measured | tokens/s 20,000 planned, 18,000 measured | "
        "peak_gib 40.00 planned, 41.50 measured"
    )
