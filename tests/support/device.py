"""run_on_device: run a function where CUDA is, in a process of its own; every other test sees no device.

torch's CUDA cannot be used in a process that is forked after it was asked for, so run_on_ranks, whose server is asked
when it loads the libraries, is for CPUs. There the devices are hidden: a CPU test must not change with the machine.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support.waiting import HANG_S

NAMES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "DS_ACCELERATOR")
_before: dict[str, str | None] = {}


def hide_devices() -> None:
    """Let this process, and those it starts, see no device; before torch is imported."""
    if not _before:
        _before.update({name: os.environ.get(name) for name in NAMES})
    os.environ.update(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")


@contextlib.contextmanager
def devices_shown() -> Iterator[None]:
    """Let processes that are started inside see the devices."""
    hidden = {name: os.environ.pop(name, None) for name in NAMES}
    os.environ.update({name: value for name, value in _before.items() if value is not None})
    try:
        yield
    finally:
        for name in NAMES:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in hidden.items() if value is not None})


@functools.cache
def has_device() -> bool:
    """Whether torch finds a device where none is hidden; asked in another process."""
    if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()):
        return False
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    with devices_shown():
        return subprocess.run([sys.executable, "-c", code]).returncode == 0


def run_on_device(fn: Callable[..., Any], *args: Any, timeout_s: float = HANG_S) -> Any:
    """fn(*args) in a process that sees the devices, and forms its groups as a run does: over NCCL.

    Args:
        fn: a module-level function; it and its result must pickle.
        timeout_s: a process that runs longer is killed and the test fails.
    Raises:
        AssertionError: it raised (its traceback is the message), died, or ran out of time.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(fn, args, sender), daemon=True)
    with devices_shown():
        process.start()
    sender.close()
    try:
        assert receiver.poll(timeout_s), f"{fn.__name__} ran over {timeout_s} s"
        error, value = receiver.recv()
    except EOFError:
        process.join(5)
        raise AssertionError(f"{fn.__name__} died with exit code {process.exitcode}") from None
    finally:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
            process.join()
    assert error is None, f"{fn.__name__} raised:\n{error}"
    return value


def _main(fn: Callable, args: tuple, sender: Any) -> None:
    try:
        sender.send((None, fn(*args)))
    except BaseException:
        sender.send((traceback.format_exc(), None))
    finally:
        sender.close()
        os._exit(0)  # no atexit handlers of libraries
