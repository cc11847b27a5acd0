"""The workers of a job come from a server that the current folder cannot mislead, and leave no trace behind."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import psutil
import pytest

from data_prep.forking import ROOT, workers_context
from tests.support.ranks import run_on_ranks


def path_of_worker(_: int) -> list[str]:
    return sys.path


@pytest.mark.parametrize("before", [None, "/somewhere"])
def test_a_worker_finds_the_project_and_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """Programs started later look where they did: a server's own settings stayed in the environment once."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if before is not None:
        monkeypatch.setenv("PYTHONPATH", before)
    monkeypatch.chdir(tmp_path)
    multiprocessing.forkserver._forkserver._stop()  # that of another test
    environment = dict(os.environ)
    with workers_context(__name__).Pool(1) as pool:
        (found,) = pool.map(path_of_worker, [0])
    assert dict(os.environ) == environment
    assert ROOT in found and str(tmp_path) not in found and "" not in found
    multiprocessing.forkserver._forkserver._stop()


def has_deepspeed() -> bool:
    return "deepspeed" in sys.modules


def test_ranks_have_everything_imported_also_after_workers_of_a_job() -> None:
    """Python has one fork server a process: 10 s of CPU in each rank, where a job had asked for it first."""
    with workers_context(__name__).Pool(1) as pool:
        pool.map(path_of_worker, [0])
    assert run_on_ranks(has_deepspeed, 1) == [True]


def test_workers_of_pytest_have_one_server_for_their_ranks(request: pytest.FixtureRequest) -> None:
    """Each would import for 9 s of CPU."""
    (server,) = run_on_ranks(os.getppid, 1)
    starts_workers = os.getppid() if hasattr(request.config, "workerinput") else os.getpid()
    assert psutil.Process(server).ppid() == starts_workers
