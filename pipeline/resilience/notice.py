"""A signal that asks the run to save and leave: any rank hears it, all obey at one step.

    Slurm --USR2 (time limit) / TERM (preemption, requeue, scancel)--> flag of the process
    a terminal or ssh that goes --HUP--> the same, unless started with nohup
    flag --with the step's numbers, StepAgreement--> every rank knows --> save, exit 0

`install_handlers()` runs before torch is imported: a notice during the seconds of start-up would
kill the process otherwise. launch/pretrain.slurm starts ranks with the signals blocked, so one that
comes even before that waits. The flag is looked at after a step, so a run that has time for one
step always makes progress. Imports the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

NOTICES = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C"}
_received: list[int] = []
_speaks = True


def install_handlers(*, speaks: bool = True) -> None:
    """USR2, TERM, HUP and the first Ctrl-C ask to save and leave; a second Ctrl-C leaves at once.

    A HUP that was ignored when the process began stays ignored: that is what nohup asks for.

    Args:
        speaks: say that the first notice was heard; one rank does.
    """
    global _speaks
    _speaks = speaks
    for number in NOTICES:
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_notice)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOTICES)


def received() -> signal.Signals | None:
    """The first notice this process got, or None. Local: other ranks may not have got one."""
    return signal.Signals(_received[0]) if _received else None


def _on_notice(number: int, _: FrameType | None) -> None:
    """Note the signal, and answer the first.

    A handler may run between any two bytecodes, in any library: it appends to a list, and writes
    without a buffer that somebody may be in the middle of.
    """
    if not _received:
        _say(
            f"{_NAMES.get(number, signal.Signals(number).name)} heard: the run saves after this "
            "step and ends;\nthe same command goes on. Ctrl-C once more ends it at once."
        )
    _received.append(number)
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, _: FrameType | None) -> None:
    """The second Ctrl-C: nothing is waited for, and no stack is of use to who asked for it.

    What the first one began to save is not whole then, and does not count.
    """
    _say("ended at once; the same command goes on at the last checkpoint.")
    os._exit(128 + number)


def _say(text: str) -> None:
    if _speaks:
        with contextlib.suppress(OSError):
            os.write(2, f"\n{text}\n".encode())
