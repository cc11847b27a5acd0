"""Processes that work off a job's units, forked from a small server that has everything imported.

They inherit no threads or sockets of this process, and a fork costs milliseconds, not imports.
"""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import forkserver, get_context, parent_process
from multiprocessing.context import ForkServerContext
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])


def workers_context(module: str) -> ForkServerContext:
    """What makes workers; their server, which imports `module`, is started unless there is one."""
    context = get_context("forkserver")
    context.set_forkserver_preload([module])
    # It would put the current folder first on its path: in data_prep/, whose file names are the
    # library's. What keeps it from that is not for the programs that this process starts later.
    paths = [ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    ours = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value
    return context


def end_with_parent() -> None:
    """Ctrl-C is the parent's business; a worker whose parent was killed ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
