"""Layouts against plain torch: losses and gradient norms of every step, within what the precision allows."""

from __future__ import annotations

from typing import Any

from tests.support.layouts import BATCH, FEW_STEPS, config, reference, train_all
from tests.support.ranks import run_on_ranks
from tests.support.unwritten import with_nan_memory

TOLERANCE = {"fp32": (1e-5, 1e-5), "bf16": (5e-3, 3e-2), "fp16": (1e-3, 1e-2)}
# Products of three bits of mantissa: ten steps stay within 2e-4 of the fp32 loss and 3e-2 of its norm.
TOLERANCE["fp8"] = (2e-3, 8e-2)

Case = dict[str, Any]
KINDS = ("documents", "masked", "positions", "batch_size")  # of the data


def four_micro_batches(world_size: int, case: Case) -> Case:
    """A step in four parts also without data parallelism: eight cost twice the collectives and prove the same."""
    model_parallel_size = case.get("tp", 1) * case.get("pp", 1) * case.get("cp", 1)
    return {"micro_batch_size": BATCH // 4 if world_size == model_parallel_size else 2, **case}


def check(
    world_size: int, cases: list[Case], *, num_steps: int = FEW_STEPS
) -> list[dict[str, Any]]:
    """Run all cases of one world size in one set of processes and compare each; what rank 0 found."""
    cases = [four_micro_batches(world_size, case) for case in cases]
    kinds = [{k: case[k] for k in KINDS if k in case} for case in cases]
    configs = [config(**{k: v for k, v in case.items() if k != "masked"}) for case in cases]
    results = run_on_ranks(
        with_nan_memory, world_size, train_all, configs, kinds, num_steps, timeout_s=1800.0
    )
    for ranks in zip(*results):
        assert all(r["history"] == ranks[0]["history"] for r in ranks), (
            "ranks disagree about loss or gradient norm"
        )
    expected: dict[str, Any] = {}
    for case, kind, cfg, got in zip(cases, kinds, configs, results[0]):
        key = f"{case['model']} {kind} {cfg.optimizer} {cfg.finetune}"
        expected.setdefault(key, None)
        if expected[key] is None:
            expected[key] = reference(cfg, num_steps=num_steps, **kind)
        precision = "fp8" if "fp8" in case else case.get("precision", "fp32")
        compare(got, expected[key], precision, str(case))
    return results[0]


def compare(
    got: dict[str, Any], expected: list[tuple[float, float]], precision: str, what: str
) -> None:
    """Assert that every loss and gradient norm is within the tolerance of the precision."""
    for step, (have, want) in enumerate(zip(got["history"], expected, strict=True)):
        for name, a, b, tolerance in zip(("loss", "grad_norm"), have, want, TOLERANCE[precision]):
            assert abs(a - b) <= tolerance * abs(b), (
                f"{what}: {name} of step {step} differs: {a} instead of {b}"
            )
