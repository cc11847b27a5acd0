"""Chosen steps are traced, once, into files that are whole; what cannot be written does not end the run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training.profile import StepProfile

CPU = torch.device("cpu")


def run(profile: StepProfile, steps: range) -> None:
    for step in steps:
        with profile.around(step), torch.profiler.record_function(f"step {step + 1}"):
            torch.ones(64, 64) @ torch.ones(64, 64)


def traced(path: Path) -> set[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return {event["name"] for event in events if event["name"].startswith("step ")}


def test_the_chosen_steps_are_traced_and_no_other(tmp_path: Path) -> None:
    """Steps as they are logged: the first is 1."""
    run(StepProfile(tmp_path, first=2, last=3, global_rank=4, device=CPU), range(5))
    folder = tmp_path / "profiles" / "steps-2-3"
    assert [path.name for path in folder.iterdir()] == ["rank-00004.trace.json.gz"]
    assert traced(folder / "rank-00004.trace.json.gz") == {"step 2", "step 3"}


def test_a_run_that_resumes_among_them_traces_the_rest(tmp_path: Path) -> None:
    run(StepProfile(tmp_path, first=2, last=4, global_rank=0, device=CPU), range(2, 6))
    (path,) = (tmp_path / "profiles" / "steps-2-4").iterdir()
    assert traced(path) == {"step 3", "step 4"}
    run(StepProfile(tmp_path / "later", first=2, last=4, global_rank=0, device=CPU), range(4, 6))
    assert not (tmp_path / "later").exists()


def test_a_full_disk_costs_the_trace_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profiles").write_text("a file where the folder should be")
    run(StepProfile(tmp_path, first=1, last=1, global_rank=0, device=CPU), range(2))
    assert "the run goes on" in caplog.text


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_cuda_allocations_are_recorded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot says who holds the memory at the peak; recording it costs, so it ends with the steps."""
    calls: list[Any] = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options)
    )
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot")
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    profile = StepProfile(tmp_path, first=1, last=1, global_rank=0, device=torch.device("cuda", 0))
    run(profile, range(1))
    assert calls == [{"max_entries": 200_000}, "synchronize", {"enabled": None}]
    names = sorted(path.name for path in (tmp_path / "profiles" / "steps-1-1").iterdir())
    assert names == ["rank-00000.memory.pickle", "rank-00000.trace.json.gz"]
