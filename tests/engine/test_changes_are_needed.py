"""Every change to foreign code is needed: without it the test that it names fails."""

from __future__ import annotations

import ast
import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.patching import Change
from tests.engine.test_engine import engine_of
from tests.support.layouts import allow_fp16_on_the_cpu, config, reset_parallel_state
from tests.support.left_out import VARIABLE
from tests.support.ranks import fork_from_here, forked_from_our_server, run_on_ranks

ROOT = Path(__file__).resolve().parents[2]
LOOK_S, STILL = 30.0, 0.01
"""Ranks that wait for each other use no CPU; what works gets more than a hundredth of a core of the busiest machine."""
GREEN, RED = map(str, (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED))

# Between them their engines make every change that a CPU makes.
CASES: dict[int, list[dict[str, Any]]] = {
    2: [
        dict(zero=1, precision="bf16"),
        dict(zero=1),
        dict(zero=2, precision="fp16"),
        dict(zero=3, precision="fp16"),
        dict(zero=2, offload=True),
        dict(pp=2, precision="fp16"),
        dict(pp=2, precision="bf16"),
        dict(pp=2),
        dict(tp=2, zero=1, precision="bf16"),
        dict(model="moe", ep=2, precision="bf16"),
    ],
    4: [
        dict(pp=2, precision="bf16"),
        dict(model="modern", tp=2, zero=0, sp=True),
    ],
}
# Made on CUDA only; its proof stands in for a device.
ON_CUDA = {"independent_gradient_partition_epilogue", "synchronize"}
ON_CUDA_WHY = "the host waits at the end of each backward pass; the next kernel is enough"


# What the source calls patching.replace and supply, and what it makes of them with partial().
DOORS = ("replace", "supply", "change", "waits")


def changes_of(cases: list[dict[str, Any]]) -> list[Change]:
    """What the engines of these layouts change when they are built."""
    from pipeline import patching

    allow_fp16_on_the_cpu()
    for case in cases:
        engine_of(config(**case))
        reset_parallel_state()
    return patching.changes()


def changes_in_source() -> tuple[set[str], set[str]]:
    """Names that the source changes through the door, and the reasons that it gives."""
    names: set[str] = set()
    reasons: set[str] = set()
    for path in (ROOT / "pipeline").rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.keyword) and node.arg == "why":
                reasons |= set(_strings([node.value]))
            is_change = isinstance(node, ast.Call) and ast.unparse(node.func) in DOORS
            if is_change and "from pipeline.patching import" in text:
                names |= set(_strings(node.args[:2]))
    return names, reasons


def _strings(nodes: list[ast.expr]) -> list[str]:
    return [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def passes_without(context: Any, title: str, proof: str) -> bool:
    """Whether the proof of a change stays green when the change is left out.

    In a process that has everything imported, as have its ranks: 12 s of CPU for a proof of 16.
    """
    with tempfile.NamedTemporaryFile("r") as said:
        run = context.Process(target=prove_without, args=(title, proof, said.name))
        run.start()
        if hangs(run):
            return False  # which is noticed
        lines = said.read().splitlines() or ["nothing"]
    assert lines[-1] in (GREEN, RED), f"{proof} did not run:\n" + "\n".join(lines)
    return lines[-1] == GREEN


def prove_without(title: str, proof: str, log_path: str) -> None:
    """In a process of its own. Its last line tells: an exit status has two readers when several processes are started."""
    log = os.open(log_path, os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)
    os.environ[VARIABLE] = title  # tests/conftest.py leaves it out; ranks are forked afterwards
    fork_from_here()
    # Others' plugins are of packages that the server may have loaded, which pytest warns of.
    words = ["-q", "-x", "-p", "no:cacheprovider", "--disable-plugin-autoload"]
    print(pytest.main([*words, proof]), flush=True)


def hangs(run: BaseProcess, *, look_s: float = LOOK_S) -> bool:
    """Wait for the end of a run, or until it and its ranks stand still, and then end it."""
    used_s = 0.0
    while True:
        run.join(look_s)
        if run.exitcode is not None:
            return False
        processes, before_s = family(run.pid), used_s
        used_s = sum(cpu_s(process) for process in processes)
        # Less than before: some have ended, so that others went on.
        if 0 <= used_s - before_s < STILL * look_s:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            run.join()
            return True


def family(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def cpu_s(process: psutil.Process) -> float:
    try:
        return sum(process.cpu_times()[:2])
    except psutil.NoSuchProcess:
        return 0.0


def work() -> None:
    """More than one look long."""
    while time.process_time() < 1.5:
        pass


@pytest.mark.slow
def test_a_run_that_stands_still_is_ended_and_one_that_works_is_not() -> None:
    """Instead of after the ten minutes that run_on_ranks waits."""
    context = multiprocessing.get_context("spawn")
    still, works = context.Process(target=time.sleep, args=(600,)), context.Process(target=work)
    for run in (still, works):
        run.start()
    assert not hangs(works, look_s=1.0) and works.exitcode == 0
    assert hangs(still, look_s=1.0) and still.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_leaving_a_change_out_turns_its_proof_red() -> None:
    """What nothing notices is not needed, or not tested."""
    made = [
        change
        for world_size, cases in CASES.items()
        for found in run_on_ranks(changes_of, world_size, cases)
        for change in found
    ]
    names, reasons = changes_in_source()
    assert names == {change.name for change in made} | ON_CUDA, "changes that no case makes"
    assert reasons == {change.why for change in made} | {ON_CUDA_WHY}
    proofs = {change.title: change.proof for change in made}
    streams = (
        "tests/engine/test_host_waits.py::test_kernels_wait_for_reductions_instead_of_the_host"
    )
    proofs |= {name: streams for name in ON_CUDA}
    on_ranks = "tests/engine/test_host_waits.py::test_a_step_reads_nothing_back[1]"
    titles = sorted(proofs)
    # A proof that hangs takes no time of a core.
    with forked_from_our_server() as context, ThreadPoolExecutor(3) as pool:
        without = partial(passes_without, context)
        assert without("nothing", on_ranks), "red whatever is left out"
        passed = list(pool.map(without, titles, [proofs[title] for title in titles]))
    assert [title for title, is_green in zip(titles, passed) if is_green] == []
