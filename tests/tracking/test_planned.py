"""Planned beside measured."""

from __future__ import annotations

from pipeline.planning.devices import load_device
from pipeline.planning.job import Job
from pipeline.planning.plan import Plan
from pipeline.tracking.planned import Planned
from tests.support.planned_run import run_of


def test_the_units_are_those_of_the_metrics():
    plan = Plan(Job.of(*run_of("training.micro_batch_size=1")), load_device("h100"))
    planned = Planned.of(plan)
    assert planned.values() == {
        "plan/step_ms": 1e3 * plan.time.total,
        "plan/tokens_per_sec": plan.tokens_per_s,
        "plan/mfu": plan.mfu,
        "plan/peak_gib": plan.memory[0].tensors / 2**30,
    }


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
