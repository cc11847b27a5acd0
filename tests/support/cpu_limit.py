"""A guard for code that can take for ever on hostile input."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def cpu_limit(*, minutes: float) -> Iterator[None]:
    """Fail when the block uses more CPU time of this process; what it guards takes a small part of that."""

    def over(*_: object) -> None:
        raise AssertionError(f"still busy after {minutes} minutes of CPU time")

    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
