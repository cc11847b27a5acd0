"""`python -m MODULE`, forked from a process that has imported what MODULE needs: nothing but the imports is spared.

    Preloaded(folder)        starts the server: this file as a program, which imports and then waits at a socket
    shared()                 one for all of pytest's workers
    PYTHON=preloaded.python  preloaded_client.py: its arguments, environment, folder, standard streams --> the server
    the server --fork-->     a keeper, one a client --fork--> the program, in the client's namespaces

Importing torch, DeepSpeed and megatron-core takes 6 s of CPU: four ranks at once need 12 s on two cores, and minutes
where others want the cores too. The client stands where its parent looks for the program: it passes signals on and
ends as the program ends; when it is killed, so is the program. Where no server waits it becomes Python itself.
Nodes of a test Slurm have their programs from one server outside: each of them would import at every boot.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

TRAINING = (
    "hydra.core.plugins", "wandb", "pipeline.training.startup", "pipeline.distributed.megatron_on_cpu",
    "pipeline.training.trainer", "pipeline.training.continuation",
    "pipeline.checkpoint.restore", "pipeline.checkpoint.tensors", "pipeline.data.loader", "pipeline.engine.deepspeed.staged",
    "pipeline.engine.state", "pipeline.planning.job", "pipeline.tracking.wandb_run", "pipeline.resilience.node_check",
)  # fmt: skip
CLIENT = Path(__file__).with_name("preloaded_client.py").resolve()
PR_SET_PDEATHSIG, PR_SET_NAME, NAME_BYTES = 1, 15, 15
START_S = 600.0


class Preloaded:
    """The server; a context manager. It and all that it has forked die with this process."""

    def __init__(self, folder: Path, *, modules: Sequence[str] = TRAINING, env: dict[str, str] | None = None) -> None:  # fmt: skip
        """Where the socket lies, what is imported, and what the environment has then."""
        self.address, self._log = folder / "preloaded.socket", folder / "preloaded.log"
        self.python = f"{sys.executable} -I -S {CLIENT} {self.address}"
        """What PYTHON must be for the launch scripts."""
        self._words = [sys.executable, "-m", "tests.support.preloaded", str(self.address), *modules]
        self._env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen | None = None  # where it was started here

    def __enter__(self) -> Preloaded:
        self.start()
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to import."""
        self.address.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._env, start_new_session=True,
                cwd=CLIENT.parents[2],
            )  # fmt: skip

    def wait(self) -> None:
        """Until it has imported, whoever started it."""
        deadline = time.monotonic() + START_S
        while not self.address.exists():
            is_over = self._process is not None and self._process.poll() is not None
            if is_over or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"nothing is preloaded\n{self._log.read_text()[-4000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End it and what it has forked, where it was started here."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def programs(self, module: str) -> list[int]:
        """Process ids of the programs of this module that live, oldest first."""
        assert self._process is not None
        pids = [pid for keeper in _children(self._process.pid) for pid in _children(keeper)]
        return sorted(pid for pid in pids if _name(pid) == module[:NAME_BYTES])


@functools.cache
def shared() -> Preloaded:
    """For the process that starts pytest's workers; each of them waits for the one in this folder."""
    server = Preloaded(Path(tempfile.mkdtemp(prefix="preloaded-")))
    server.start()
    atexit.register(lambda: (server.stop(), shutil.rmtree(server.address.parent)))
    return server


def _children(pid: int) -> list[int]:
    """Process ids of the children of a process with one thread."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _name(pid: int) -> str:
    """What a process calls itself; '' when it is gone, or dead and not yet buried."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    name, _, rest = status.partition("(")[2].rpartition(") ")
    return "" if rest.startswith("Z") else name


def serve(address: Path) -> list[str]:
    """Fork a program for each client; returns in the program, with its words.

    One thread, as a fork copies only the one that forks: a lock that another holds would stay locked.
    """
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads: these modules cannot be preloaded"
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are buried as they end
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(not_yet := address.with_suffix(".new")))
    listener.listen(64)
    not_yet.rename(address)  # who sees the name can connect
    while True:
        client = listener.accept()[0]
        if _fork():
            client.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        header, streams, _, _ = socket.recv_fds(client, 8, 3)
        request = client.recv(int.from_bytes(header, "little"), socket.MSG_WAITALL)
        namespaces = _namespaces_of(client)
        _enter(namespaces, "pid")  # for what is forked from here on
        if pid := _fork():
            _keep(pid, client)
        client.close()
        _enter(namespaces, "mnt", "uts", "ipc", "net")
        return _become(request, streams)


def _fork() -> int:
    """os.fork; the child is killed when this process ends."""
    if (pid := os.fork()) == 0:
        _end_with_the_parent()
    return pid


def _end_with_the_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _namespaces_of(client: socket.socket) -> dict[str, int]:
    """Open files of the namespaces that are the client's and not this process's, by their kind."""
    place = struct.calcsize("3i")  # process, user and group: unix(7)
    pid, *_ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, place))
    found = {}
    for kind in ("pid", "mnt", "uts", "ipc", "net"):
        theirs = Path(f"/proc/{pid}/ns/{kind}")
        if not theirs.samefile(f"/proc/self/ns/{kind}"):
            found[kind] = os.open(theirs, os.O_RDONLY | os.O_CLOEXEC)
    return found


def _enter(namespaces: dict[str, int], *kinds: str) -> None:
    """As nsenter(1) does; a namespace of processes is entered by the children."""
    for kind in kinds:
        if kind in namespaces and ctypes.CDLL(None, use_errno=True).setns(namespaces[kind], 0):
            raise OSError(ctypes.get_errno(), f"setns of {kind}")


def _keep(pid: int, client: socket.socket) -> NoReturn:
    """Kill the program when its client ends, tell the client when the program does."""
    seen_by_client = Path(f"/proc/{pid}/status").read_text().partition("NSpid:")[2].split("\n")[0]
    client.sendall(int(seen_by_client.split()[-1]).to_bytes(8, "little"))
    ends = select.poll()
    ends.register(client, select.POLLIN)
    ends.register(process := os.pidfd_open(pid), select.POLLIN)
    if process not in dict(ends.poll()):
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        client.sendall(code.to_bytes(8, "little", signed=True))
    os._exit(0)


def _become(request: bytes, streams: Sequence[int]) -> list[str]:
    """Take over what the client has; the words behind -m."""
    words, environment, folder, ignored, blocked = json.loads(request)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # Those of the server know whether its streams could seek.
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering=1, closefd=False, errors=errors)
        for number, mode, errors in ((0, "r", None), (1, "w", None), (2, "w", "backslashreplace"))
    )
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, folder)
    for signal_number in ignored:
        signal.signal(signal_number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    ctypes.CDLL(None).prctl(PR_SET_NAME, words[0].encode()[:NAME_BYTES])
    return words


def main(address: str, *modules: str) -> None:
    """Serve until the process that started this one ends; in a forked process, run its program."""
    _end_with_the_parent()
    for module in modules:
        importlib.import_module(module)
    sys.argv = serve(Path(address))
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
