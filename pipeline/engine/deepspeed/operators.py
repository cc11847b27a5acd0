"""DeepSpeed's compiled operators: compiled by one process; one that is killed holds nobody up."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils import cpp_extension

from pipeline.log import logger

LOCK = "lock"
"""torch.utils.file_baton's name for it, beside what is compiled."""
OURS = "compiling"
POLL_S = 0.2
QUIET_S = 120.0
"""A compiler that writes nothing for so long is gone; cpu_adam.cpp takes 30 to 60 s of a core."""


def load_host_adam() -> None:
    """Compile the optimizer of offloaded states, or load it; DeepSpeed then finds it loaded."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import CPUAdamBuilder

    builder = CPUAdamBuilder()
    if installed_ops.get(builder.name):  # compiled with DeepSpeed (DS_BUILD_CPU_ADAM=1)
        return
    folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
    if not any(folder.glob("*.so")):
        logger.info("compiling DeepSpeed's %s in %s: a minute, once", builder.name, folder)
    with one_compiler(folder):
        builder.load(verbose=False)


@contextlib.contextmanager
def one_compiler(folder: Path) -> Iterator[None]:
    """No other of our processes compiles in `folder` meanwhile, and no dead one's lock is there.

    torch's lock is a file that its owner deletes. An owner that was killed leaves it, and every
    later start waits for ever, without a word. The lock held here ends with its process, so torch's
    file is a dead process's, or another program's: that one holds it open, or writes beside it.
    """
    descriptor = os.open(folder / OURS, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: as torch does it
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        lock = folder / LOCK
        while lock.exists() and not _is_left_behind(lock):
            time.sleep(POLL_S)
        with contextlib.suppress(FileNotFoundError):
            lock.unlink()
            logger.warning("%s was left by a process that was killed: deleted", lock)
        yield
    finally:
        os.close(descriptor)


def _is_left_behind(lock: Path) -> bool:
    """Whether nobody here holds it open and nobody elsewhere writes beside it (a home on NFS)."""
    real, written = lock.resolve(), [0.0]
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # gone, or another person's
            if link.readlink() == real:
                return False
    for path in lock.parent.iterdir():
        with contextlib.suppress(OSError):  # gone meanwhile
            written.append(path.stat().st_mtime if path.name != OURS else 0.0)
    return time.time() - max(written) > QUIET_S
