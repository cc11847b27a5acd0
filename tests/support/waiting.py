"""Waiting for what must come: for a condition, never for a time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

HANG_S = 600.0
"""Only a hang lasts so long. A tighter bound fails what is right on a busy machine."""


def wait_until(claim: Callable[[], object]) -> None:
    """Return as soon as the claim holds."""
    deadline = time.monotonic() + HANG_S
    while not claim():
        assert time.monotonic() < deadline, "what was waited for never came"
        time.sleep(0.005)


def names_under(folder: Path) -> set[str]:
    """Every file and folder there, also while they come and go."""
    return {
        os.path.join(path, name)
        for path, folders, files in os.walk(folder)
        for name in (*folders, *files)
    }


def kill_after_new_names(child: int, folder: Path, number: int) -> None:
    """Kill a forked child when so many new names have come under a folder, or it has ended."""
    before, ended = names_under(folder), os.WEXITED | os.WNOHANG | os.WNOWAIT
    wait_until(
        lambda: len(names_under(folder) - before) >= number or os.waitid(os.P_PID, child, ended)
    )
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
