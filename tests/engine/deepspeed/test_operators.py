"""Compiled operators: a killed compiler's lock is not waited for, a living one's is."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.file_baton import FileBaton

from pipeline.engine.deepspeed import operators
from pipeline.engine.deepspeed.operators import LOCK, QUIET_S, one_compiler
from tests.support.waiting import HANG_S

OLD_S = QUIET_S + 60


def make_old(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (time.time() - OLD_S,) * 2)


def test_a_killed_compilers_lock_keeps_nobody_waiting(tmp_path: Path, caplog: Any) -> None:
    """torch waits for ever, and says nothing: a run with offload_optimizer never started again."""
    (tmp_path / LOCK).touch()
    make_old(tmp_path)
    with one_compiler(tmp_path):
        assert FileBaton(str(tmp_path / LOCK)).try_acquire()
    assert "left by a process that was killed" in caplog.text


@pytest.mark.parametrize("sign", ["held open", "beside it something is written"])
def test_another_programs_lock_is_waited_for(
    sign: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    baton = FileBaton(str(tmp_path / LOCK))
    assert baton.try_acquire()
    if sign == "held open":
        make_old(tmp_path)
    else:
        os.close(baton.fd)
        baton.fd = None
    looks = []

    def pause(_: float) -> None:
        looks.append(0)
        assert (tmp_path / LOCK).exists()
        if len(looks) == 3:
            baton.release()

    monkeypatch.setattr(operators.time, "sleep", pause)
    with one_compiler(tmp_path):
        assert len(looks) == 3


def compile_slowly(folder: Path, inside: Any) -> None:
    with one_compiler(folder):
        inside.send(os.getpid())
        time.sleep(HANG_S)


def test_one_process_compiles_and_a_killed_one_gives_way(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    told, inside = context.Pipe(duplex=False)
    both = [context.Process(target=compile_slowly, args=(tmp_path, inside)) for _ in range(2)]
    try:
        for process in both:
            process.start()
        assert told.poll(HANG_S)
        first = told.recv()
        assert not told.poll(1.0)
        next(process for process in both if process.pid == first).kill()
        assert told.poll(HANG_S)
        assert told.recv() != first
    finally:
        for process in both:
            process.kill()
            process.join()
