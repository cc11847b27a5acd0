"""What PYTHON names for tests.support.preloaded; imports little, for it is started as often as a program is.

python preloaded_client.py SOCKET -m MODULE ...
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)


def main(address: str, words: list[str]) -> None:
    """Ask the server for the program, and be it: its signals, its exit code, its end."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if words[:1] != ["-m"]:
            raise OSError("the server runs modules only")
        server.connect(address)
    except OSError:
        os.execv(sys.executable, [sys.executable, *words])
    ignored = [number for number in FORWARDED if signal.getsignal(number) is signal.SIG_IGN]
    # What is sent from here on waits until the program is known; it gets the mask of before.
    blocked = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)]
    request = json.dumps([words[1:], dict(os.environ), os.getcwd(), ignored, blocked]).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(request)
    pid = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "little")
    _forward_until(server, pid, [number for number in FORWARDED if number not in ignored])
    answer = server.recv(8, socket.MSG_WAITALL)
    # Nothing: the server is gone, and what it has forked with it.
    code = int.from_bytes(answer, "little", signed=True) if answer else -signal.SIGKILL
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _forward_until(server: socket.socket, pid: int, numbers: list[signal.Signals]) -> None:
    """Send on what arrives until the server says how the program ended.

    By the wakeup pipe: a handler in Python could come between its check for signals and a call that waits for ever.
    """
    arrived, arriving = os.pipe()
    os.set_blocking(arriving, False)
    signal.set_wakeup_fd(arriving)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)  # the program has them blocked itself
    ends = select.poll()
    ends.register(server, select.POLLIN)
    ends.register(arrived, select.POLLIN)
    while server.fileno() not in dict(ends.poll()):
        for number in os.read(arrived, 64):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass  # it has just ended: the server is about to say so


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
