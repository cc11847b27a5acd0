"""A step is launched and left alone: the host reads nothing back, so the device never runs dry between two steps.

On a CPU a read costs nothing, but it is the same call: `item()`, `bool()`, `float()`, `tolist()` of a tensor all end in
one operator, and `torch.tensor(1.0, device=...)` is the copy that makes CUDA wait. Both are caught here, whoever calls
them, DeepSpeed included. The test marked gpu lets CUDA itself object.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.test_engine import engine_of
from tests.support.device import run_on_device
from tests.support.layouts import (
    allow_fp16_on_the_cpu,
    batches,
    config,
    rank_batches,
    reset_parallel_state,
)
from tests.support.ranks import run_on_ranks

READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}
COPIES = {torch.tensor, torch.as_tensor, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}


class _Reads(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        # A tensor made of Python numbers begins with a lift: a device is sent it, but for lone ones.
        if name in READS or (name == "aten::lift_fresh" and args[0].numel() > 1):
            self.found.append(f"{func.name()}\n{''.join(traceback.format_stack(limit=8)[:-1])}")
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COPIES:
            self.found.append(f"{func.__name__}\n{''.join(traceback.format_stack(limit=8)[:-1])}")
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[list[str]]:
    """Every read and every synchronous copy of the block, with the stack that made it."""
    found: list[str] = []
    with _Reads(found), _Copies(found):
        yield found


def reads_of(cases: list[dict[str, Any]]) -> list[list[str]]:
    """Stacks of the third step of each case, its limit on the loss set; the first steps may set up."""
    answers = []
    allow_fp16_on_the_cpu()
    for case in cases:
        engine = engine_of(config(**{"micro_batch_size": 4, **case}))  # two to four a step
        for number, step in enumerate(batches(masked=True)[:2]):
            engine.train_step(rank_batches(step, engine.shape, engine.layout), step=number)
        parts = rank_batches(batches(masked=True)[2], engine.shape, engine.layout)
        with watched() as found:
            engine.train_step(parts, step=2, max_loss=100.0)
        answers.append(found)
        reset_parallel_state()
    return answers


CASES: dict[int, list[dict[str, Any]]] = {
    1: [
        dict(zero=0),
        dict(model="modern", zero=1, precision="bf16", recompute="full", dropout=0.1),
        dict(zero=2, precision="bf16"),
        dict(zero=2, precision="fp16"),
        dict(zero=3),
        dict(zero=3, precision="fp16"),
    ],
    2: [
        dict(zero=0, tp=2),
        dict(zero=1),
        dict(zero=1, precision="bf16"),
        dict(model="modern", zero=2, precision="bf16"),
        dict(zero=3, precision="bf16"),
        dict(pp=2, precision="bf16"),
        dict(model="modern", pp=2, schedule="dualpipev"),
        dict(model="modern", tp=2, precision="bf16", optimizer="muon"),
    ],
}  # fmt: skip


def test_the_watch_sees_reads_and_copies() -> None:
    """A check that cannot fail proves nothing."""
    number = torch.ones(())
    with watched() as found:
        for read in (
            float,
            bool,
            int,
            torch.Tensor.item,
            torch.Tensor.tolist,
            lambda n: 1.0 if n > 0 else 2.0,
        ):
            before = len(found)
            read(number)
            assert len(found) > before
        torch.tensor(1.0, device="cpu")
        assert "tensor" in found[-1]
        torch.Tensor([0.0, 0.0])
        assert "lift_fresh" in found[-1]


@pytest.mark.parametrize(
    "world_size", [pytest.param(n, marks=[pytest.mark.slow] * (n == 2)) for n in CASES]
)
def test_a_step_reads_nothing_back(world_size: int) -> None:
    """After one wait a step the device is idle until the host has launched the next kernels."""
    of_ranks = run_on_ranks(reads_of, world_size, CASES[world_size])
    for case, found in zip(CASES[world_size], zip(*of_ranks), strict=True):
        for stacks in found:
            assert not stacks, f"{case}: {len(stacks)} waits, the first\n{stacks[0]}"


def test_what_routers_do_is_counted_without_a_read() -> None:
    """Experts need the number of their tokens on the host; the metrics' sums wait for a logging step."""
    [[found]] = run_on_ranks(reads_of, 1, [dict(model="moe-aux", zero=0)])
    assert found, "the watch sees the experts' reads"
    assert not [stack for stack in found if "in _count" in stack or "in take_tallies" in stack]


def strictly_on_cuda(case: dict[str, Any]) -> None:
    engine = engine_of(config(**case))
    steps = [rank_batches(step, engine.shape, engine.layout) for step in batches(masked=True)[:4]]
    for part in (batch for parts in steps for batch in parts):
        for name in ("tokens", "labels", "loss_mask"):
            setattr(part, name, getattr(part, name).cuda())
    for number, parts in enumerate(steps):
        torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
        engine.train_step(parts, step=number, max_loss=100.0)
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES[1], ids=str)
def test_cuda_finds_no_wait_in_a_step(case: dict[str, Any]) -> None:
    run_on_device(strictly_on_cuda, case)


def synchronisations(case: dict[str, Any]) -> dict[str, int]:
    """Calls of a third step that make the host wait, as CUDA's profiler counts them."""
    engine = engine_of(config(**case))
    steps = [rank_batches(step, engine.shape, engine.layout) for step in batches()[:3]]
    for part in (batch for parts in steps for batch in parts):
        part.tokens, part.labels = part.tokens.cuda(), part.labels.cuda()
    for number, parts in enumerate(steps[:2]):
        engine.train_step(parts, step=number)
    torch.cuda.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        engine.train_step(steps[2], step=2)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert any("Launch" in name for name in counts), "the profiler saw no kernel"
    return {name: count for name, count in counts.items() if "Synchronize" in name}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES[1], ids=str)
def test_the_host_synchronises_with_nothing_in_a_step(case: dict[str, Any]) -> None:
    """set_sync_debug_mode does not see device, stream and event synchronisations; the profiler's own end is one."""
    assert sum(run_on_device(synchronisations, case).values()) <= 1


def streams_of_stage(stage: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    from pipeline.engine.deepspeed import changes

    waited: list[Any] = []
    reductions = SimpleNamespace(synchronize=lambda: waited.append("the host"))
    kernels = SimpleNamespace(wait_stream=waited.append)
    monkeypatch.setattr(get_accelerator(), "current_stream", lambda: kernels)
    monkeypatch.setattr(
        type(get_accelerator()), "synchronize", lambda *_: waited.append("the host")
    )
    if stage == 3:
        optimizer: Any = object.__new__(DeepSpeedZeroOptimizer_Stage3)
        optimizer.reduce_and_partition_stream = reductions
        epilogue = lambda: optimizer.reduce_and_partition_stream.synchronize()  # noqa: E731
    else:
        optimizer = SimpleNamespace(reduction_stream=reductions)
        optimizer.independent_gradient_partition_epilogue = lambda: get_accelerator().synchronize()
        epilogue = lambda: optimizer.independent_gradient_partition_epilogue()  # noqa: E731
    changes._order_by_streams(optimizer)
    epilogue()
    get_accelerator().synchronize()
    return ["the reductions" if stream is reductions else stream for stream in waited]


@pytest.mark.parametrize("stage", [1, 3])
def test_kernels_wait_for_reductions_instead_of_the_host(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What DeepSpeed waits for on the host at the end of a backward pass; elsewhere its waits stay as they are."""
    assert streams_of_stage(stage, monkeypatch) == ["the reductions", "the host"]
