"""A web server on loopback with faults on demand: 5xx, resets, short bodies, wrong bytes, slow bodies."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Served:
    """A running server."""

    url: str
    requests: list[str] = field(default_factory=list)
    """Paths in order of arrival."""
    fault: Callable[[str, int], str | None] = lambda path, nth: None
    """(path, how many requests came for it before) -> error | reset | short | wrong | slow | None."""
    ranges: bool = True
    """Whether Range headers are honoured."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Server(ThreadingHTTPServer):
    """What a handler reads and notes."""

    daemon_threads = True
    folder: Path
    served: Served


class Handler(BaseHTTPRequestHandler):
    """Serves the files of its server's folder, with the faults that the test asks for."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        served = self.server.served
        with served.lock:
            nth = served.requests.count(self.path)
            served.requests.append(self.path)
        fault = served.fault(self.path, nth)
        file = self.server.folder / self.path.lstrip("/")
        if not file.is_file():
            return self.send_error(404)
        if fault == "error":
            return self.send_error(503)
        data, status, asked = file.read_bytes(), 200, self.headers.get("Range")
        if asked and served.ranges:
            first, last = asked.removeprefix("bytes=").split("-")
            data, status = data[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.send_body(data, fault)

    def send_body(self, data: bytes, fault: str | None) -> None:
        if fault == "wrong":
            data = bytes([data[0] ^ 1]) + data[1:]
        if fault == "slow":
            for at in range(0, len(data), 1 + len(data) // 4):
                self.wfile.write(data[at : at + 1 + len(data) // 4])
                self.wfile.flush()
                time.sleep(0.05)
        elif fault in ("short", "reset"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            if fault == "reset":  # linger 0: the peer gets RST in the middle of the body
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                self.connection.close()
        else:
            self.wfile.write(data)

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # clients leave, and so do we on purpose
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Served]:
    """Serve a folder until the block ends."""
    server = Server(("127.0.0.1", 0), Handler)
    server.folder, server.served = folder, Served(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield server.served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
