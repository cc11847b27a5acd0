"""One address on loopback: a page to talk to, and OpenAI's endpoints.

    browser, OpenAI's client --> Front --fitted requests--> `transformers serve`, on another port
                                                            that answers nobody else (upstream.py)

Only this machine is answered, and of its browsers only this page: a site that somebody visits can
send requests to 127.0.0.1 too, under a name of its own (DNS rebinding) or from its own pages.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pipeline.errors import MachineError, PipelineError
from pipeline.files import parse_json
from pipeline.inference import upstream as upstream_program
from pipeline.inference.pictures import MOST_BYTES as PICTURE_BYTES
from pipeline.inference.served import Served

HERE = "127.0.0.1"
NAMES = (HERE, "localhost")
START_S = 600.0
"""After so long a server that reads a model from a slow disk will not come."""
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PAGE = Path(__file__).with_name("talk.html")


class Upstream(NamedTuple):
    """The server that computes."""

    port: int
    word: str
    """Without it nobody is answered there."""

    def connect(self, timeout: float | None = None) -> http.client.HTTPConnection:
        """To its port."""
        return http.client.HTTPConnection(HERE, self.port, timeout=timeout)

    @property
    def headers(self) -> dict[str, str]:
        """Of a request to it."""
        return {upstream_program.HEADER: self.word}


class Front(ThreadingHTTPServer):
    """Listens from the start; answers once it has a model."""

    daemon_threads = True

    def answer_with(self, model: Served, upstream: Upstream) -> None:
        """Serve `model`, which `upstream` computes."""
        self.model, self.upstream = model, upstream


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Front
    timeout = 60
    """Seconds that a client may take to send its request."""

    def do_GET(self) -> None:  # noqa: N802 - http.server's name
        """The page, the model's name, or that the server is there."""
        path = self.path.partition("?")[0]
        if not self._is_from_here():
            return
        if path == "/":
            self._send_page()
        elif path == "/v1/models":
            model = {"id": self.server.model.name, "object": "model", "owned_by": "pretrain"}
            self._send_json(200, {"object": "list", "data": [{**model, "created": 0}]})
        elif path == "/health":
            self._send_json(200, {"status": "ok"})
        else:
            self._refuse(404, f"there is nothing at {path}.")

    def do_POST(self) -> None:  # noqa: N802 - http.server's name
        """Hand a request on, cut to what the model has room for."""
        path, length = self.path.partition("?")[0], self.headers.get("Content-Length", "")
        most = self.server.model.most_bytes
        if not length.isdecimal() or len(length) > 9 or int(length) > most:
            return self._refuse(413, f"a request has a length, of at most {most} bytes.")
        raw = self.rfile.read(int(length))  # first: who closes on unread bytes resets the answer
        if not self._is_from_here():
            return None
        if path not in (CHAT, TEXT):
            return self._refuse(404, f"there is nothing at {path}; requests go to {CHAT}.")
        try:
            asked = parse_json(raw)
            if not isinstance(asked, dict):
                raise ValueError("it is no mapping")
            asked = self.server.model.fit(asked, chat=path == CHAT)
        except PipelineError as error:
            return self._refuse(400, str(error))
        except ValueError as error:
            return self._refuse(400, f"the request is no JSON: {error}.")
        return self._hand_on(path, asked)

    def _hand_on(self, path: str, asked: dict[str, Any]) -> None:
        """Answer with what transformers' server answers, piece by piece.

        Who goes away while the answer comes ends its computation: the connection is closed there.
        """
        with contextlib.closing(self.server.upstream.connect()) as upstream:
            try:
                headers = {"Content-Type": "application/json", **self.server.upstream.headers}
                upstream.request("POST", path, json.dumps(asked).encode(), headers)
                answer = upstream.getresponse()
            except (OSError, http.client.HTTPException) as error:
                return self._refuse(502, f"transformers serve does not answer: {error}.")
            with contextlib.suppress(ConnectionError, TimeoutError):
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
                self._end_headers()
                for piece in _pieces(answer):
                    self.wfile.write(piece)
                    self.wfile.flush()

    def _is_from_here(self) -> bool:
        """Whether this machine asks, by its own name, and no page but this server's; else refuse.

        Another port of this machine has pages too: of a notebook, of somebody else's server.
        """
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        with contextlib.suppress(ValueError):  # a `[` that is never closed
            is_own_page = origin is None or urlsplit(origin).netloc == host
            if is_own_page and urlsplit(f"//{host}").hostname in NAMES:
                return True
        self._refuse(403, f"only pages and programs of {HERE} are answered.")
        return False

    def _send_page(self) -> None:
        """The page, which may run its own script and ask this address, and nothing else."""
        nonce, model = secrets.token_urlsafe(16), self.server.model
        about = {
            "model": model.name,
            "chat": model.is_chat,
            "context": model.context,
            "temperature": model.temperature,
            "pictures": model.sight is not None,
            "picture_bytes": PICTURE_BYTES,
        }
        text = PAGE.read_text().replace("__NONCE__", nonce)
        text = text.replace("__TITLE__", escape(model.name))
        page = text.replace("__ABOUT__", json.dumps(about).replace("<", r"\u003c")).encode()
        allowed = f"'nonce-{nonce}'"
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header(
            "Content-Security-Policy",
            f"default-src 'none'; script-src {allowed}; style-src {allowed}; img-src data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        )
        self.send_header("Content-Length", str(len(page)))
        self._end_headers()
        self.wfile.write(page)

    def _refuse(self, status: int, message: str) -> None:
        self._send_json(status, _error(message, "invalid_request_error"))

    def _send_json(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        with contextlib.suppress(ConnectionError, TimeoutError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self._end_headers()
            self.wfile.write(body)

    def _end_headers(self) -> None:
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what is asked is nobody's business but the asker's."""


def _error(message: str, kind: str) -> dict[str, Any]:
    """In the form of OpenAI's errors, which its client raises."""
    return {"error": {"message": message, "type": kind}}


def _pieces(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """An answer as it comes; one that breaks off says so, or it would look whole."""
    try:
        while piece := answer.read1(1 << 16):
            yield piece
    except (OSError, http.client.HTTPException):
        row = json.dumps(_error("transformers serve ended in the middle.", "server_error"))
        if answer.headers.get_content_type() == "text/event-stream":
            yield f"data: {row}\n\n".encode()


def listening(port: int) -> Front:
    """The server, whose port is taken from now on.

    Raises:
        MachineError: the port is taken, or not for this user.
    """
    try:
        return Front((HERE, port), Handler)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise MachineError(
            f"port {port} cannot be used: {error.strerror}. Take another one: port={port + 1}, or "
            "port=0 for any that is free."
        ) from None


@contextlib.contextmanager
def transformers_serve(model: Served, scratch: Path) -> Iterator[Upstream]:
    """`transformers serve` of the model until the block ends.

    Raises:
        MachineError: it ended before it answered, has not begun to, or answers everybody.
    """
    with socket.create_server((HERE, 0)) as free:
        upstream = Upstream(free.getsockname()[1], secrets.token_urlsafe(32))
    # -P: no module is taken from the folder it runs in, which has the model's files below it.
    python = [*ended_with_this_process("KILL"), sys.executable, "-P"]
    root = str(Path(__file__).resolve().parents[2])
    settings = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        upstream_program.VARIABLE: upstream.word,
    }
    log = scratch / "transformers-serve.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*python, "-m", upstream_program.__name__, model.name, str(upstream.port)],
            cwd=model.folder.parent,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C of the terminal is ours to hear
        )
    give_up_at = time.monotonic() + START_S
    try:
        while _health(upstream, upstream.headers) != 200:
            has_ended, is_late = server.poll() is not None, time.monotonic() > give_up_at
            if has_ended or is_late:
                what = "ended at its start" if has_ended else f"has not answered in {START_S:g} s"
                said = log.read_text(errors="backslashreplace").strip().splitlines()[-15:]
                raise MachineError("\n".join([f"transformers serve {what}:", *said]))
            time.sleep(0.2)
        if _health(upstream, {}) != 403:
            raise MachineError(
                "this release of transformers lets everybody on this machine ask its server, which "
                "is not served: install the version in constraints.txt."
            )
        yield upstream
    finally:
        server.kill()
        server.wait()


def ended_with_this_process(signal_name: str) -> list[str]:
    """Words before a command that gets a signal when this process ends, however it does."""
    return ["setpriv", "--pdeathsig", signal_name] if shutil.which("setpriv") else []


def _health(upstream: Upstream, headers: dict[str, str]) -> int:
    """The status of its answer; 0: it has not begun to answer."""
    with contextlib.closing(upstream.connect(timeout=5)) as connection:
        try:
            connection.request("GET", "/health", headers=headers)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0
