"""Every change to foreign code is needed: without it the test that it names fails."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.patching import Change
from tests.engine.test_engine import engine_of
from tests.support.layouts import allow_fp16_on_the_cpu, config, reset_parallel_state
from tests.support.left_out import VARIABLE
from tests.support.ranks import run_on_ranks

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 600.0

# Between them their engines make every change that a CPU makes.
CASES: list[dict[str, Any]] = [
    dict(zero=1, precision="bf16"),
    dict(zero=2, precision="fp16"),
    dict(zero=3, precision="fp16"),
    dict(pp=2, precision="fp16"),
    dict(pp=2, precision="bf16"),
    dict(pp=2),
    dict(tp=2, zero=1, precision="bf16"),
    dict(model="moe", ep=2, precision="bf16"),
]
# Made on CUDA only; its proof stands in for a device.
ON_CUDA = {"independent_gradient_partition_epilogue", "synchronize"}


def changes_of(cases: list[dict[str, Any]]) -> list[Change]:
    from pipeline import patching

    allow_fp16_on_the_cpu()
    for case in cases:
        engine_of(config(**case))
        reset_parallel_state()
    return patching.changes()


def passes_without(key: str, proof: str) -> bool:
    """Whether the proof of a change stays green when the change is left out."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", proof]
    environment = {**os.environ, VARIABLE: key}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return False  # a hang is noticed
    assert done.returncode in (0, 1), f"{proof} did not run:\n{done.stdout}\n{done.stderr}"
    return done.returncode == 0


@pytest.mark.slow
def test_leaving_a_change_out_turns_its_proof_red() -> None:
    """What nothing notices is not needed, or not tested."""
    proofs = {change.key: change.proof for change in run_on_ranks(changes_of, 2, CASES)[0]}
    streams = (
        "tests/engine/test_host_waits.py::test_kernels_wait_for_reductions_instead_of_the_host"
    )
    proofs |= {name: streams for name in ON_CUDA}
    assert len(proofs) > 10
    keys = sorted(proofs)
    with ThreadPoolExecutor(3) as pool:  # a proof that hangs takes no time of a core
        passed = list(pool.map(passes_without, keys, [proofs[key] for key in keys]))
    assert [key for key, is_green in zip(keys, passed) if is_green] == []
