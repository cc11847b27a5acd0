"""What stands in front of transformers' server: who is answered, what is handed on, what is refused."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import MachineError
from pipeline.inference import front
from pipeline.inference.served import Served
from pipeline.inference.upstream import HEADER
from tests.inference.test_chat_models import chat_tokenizer
from tests.support.waiting import HANG_S

SAID = b'data: {"choices": [{"text": "t7"}]}\n\n'
WORD = "between-front-and-upstream"
BREAKS_OFF = "t9"


class Upstream(BaseHTTPRequestHandler):
    """In the place of `transformers serve`: keeps what it is asked."""

    asked: list[tuple[str, dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        assert self.headers[HEADER] == WORD
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        if body["prompt"] == BREAKS_OFF:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(
            SAID if body["prompt"] != BREAKS_OFF else b"%x\r\n%s\r\n" % (len(SAID), SAID)
        )

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """A front with a model of forty positions called <b>mine."""
    tokenizer = Tokenizer.from_file(chat_tokenizer(tmp_path / "tokenizer.json"))
    model = Served(tmp_path / "<b>mine", 40, 0.8, tokenizer, None, is_chat=False)
    upstream = HTTPServer((front.HERE, 0), Upstream)
    with front.listening(0) as server, upstream:
        server.answer_with(model, front.Upstream(upstream.server_address[1], WORD))
        threads = [threading.Thread(target=one.serve_forever, args=(0.05,)) for one in (server, upstream)]  # fmt: skip
        for thread in threads:
            thread.start()
        yield server.server_address[1]
        for one in (server, upstream):
            one.shutdown()
        for thread in threads:
            thread.join()


def ask(
    port: int, path: str, body: Any = None, *, host: str | None = None, **headers: str
) -> tuple[int, str, http.client.HTTPMessage]:
    """(status, text, headers)."""
    connection = http.client.HTTPConnection(front.HERE, port, timeout=HANG_S)
    raw = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    connection.request(method, path, raw, {"Host": host or f"{front.HERE}:{port}", **headers})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, answer.headers


def test_the_page_needs_nothing_from_elsewhere_and_runs_no_other_script(port: int) -> None:
    """The model's name comes from a file: it is text on the page, whatever it is."""
    status, page, headers = ask(port, "/")
    assert status == 200 and "<b>mine" not in page and "&lt;b&gt;mine" in page
    assert not re.search(r"https?://|__[A-Z]+__", page)
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", headers["Content-Security-Policy"])
    assert nonce is not None and page.count(f'nonce="{nonce[1]}"') == 2
    assert nonce[1] not in ask(port, "/")[1]
    about = json.loads(re.search(r'id="about">(.*?)</script>', page)[1])  # type: ignore[index]
    assert about == {
        "model": "<b>mine", "chat": False, "context": 40, "temperature": 0.8, "pictures": False,
        "picture_bytes": 20_000_000,
    }  # fmt: skip


def test_a_request_is_handed_on_cut_to_the_models_room(port: int) -> None:
    Upstream.asked.clear()
    status, text, headers = ask(port, front.TEXT, {"prompt": "t5 t6", "stream": True})
    assert (status, text) == (200, SAID.decode()) and headers["Content-Type"] == "text/event-stream"
    fitted = {"prompt": "t5 t6", "stream": True, "max_tokens": 38, "temperature": 0.8}
    assert Upstream.asked == [(front.TEXT, fitted)]


def test_models_are_listed_as_openai_lists_them(port: int) -> None:
    listed = json.loads(ask(port, "/v1/models")[1])
    assert [model["id"] for model in listed["data"]] == ["<b>mine"]


@pytest.mark.parametrize(
    "path, body, part",
    [
        (front.TEXT, b"{", "no JSON"),
        (front.TEXT, [1], "no mapping"),
        (front.TEXT, {"prompt": 1}, "must be a text"),
        (front.CHAT, {"messages": [{"role": "user", "content": "t5"}]}, "no chat template"),
    ],
)
def test_a_request_of_another_form_is_refused_with_the_reason(
    port: int, path: str, body: Any, part: str
) -> None:
    """In the form of OpenAI's errors, which its client shows."""
    status, text, _ = ask(port, path, body)
    assert status == 400 and part in json.loads(text)["error"]["message"]


def test_only_this_machine_is_answered(port: int) -> None:
    """A page that somebody visits can send requests here, from its own site or under a name of its own."""
    Upstream.asked.clear()
    good = {"prompt": "t5"}
    assert ask(port, front.TEXT, good, host="evil.example")[0] == 403
    assert ask(port, front.TEXT, good, Origin="https://evil.example")[0] == 403
    assert ask(port, "/", host=f"evil.example:{port}")[0] == 403
    other_page = f"http://{front.HERE}:{port + 1}"  # a notebook's, or of another user's server
    assert ask(port, front.TEXT, good, Origin=other_page)[0] == 403
    assert Upstream.asked == []
    assert (
        ask(port, front.TEXT, good, host="localhost:9999", Origin="http://localhost:9999")[0] == 200
    )


@pytest.mark.parametrize(
    "request_of, status",
    [
        ("GET / HTTP/1.1\r\nHost: [\r\n\r\n", b"403"),
        ("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://[\r\n\r\n", b"403"),
        ("GET //[ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"404"),
        (f"POST {front.TEXT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {'9' * 5000}\r\n\r\n", b"413"),
    ],
    ids=["host", "origin", "path", "length"],
)  # fmt: skip
def test_what_is_no_request_is_refused_without_a_traceback(
    port: int, request_of: str, status: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    """The terminal of whoever serves would fill with them, and nobody be answered."""
    with socket.create_connection((front.HERE, port), 30) as connection:
        connection.sendall(request_of.encode())
        assert connection.recv(1 << 16).split()[1] == status
    assert "Traceback" not in capfd.readouterr().err


def test_an_answer_that_breaks_off_says_so(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    """A server that memory has run out for ended in half an answer, which looked like a whole one."""
    _, text, _ = ask(port, front.TEXT, {"prompt": BREAKS_OFF, "stream": True})
    said, problem, *_ = text.split("\n\n")
    assert said == SAID.decode().strip()
    assert "ended in the middle" in json.loads(problem.removeprefix("data: "))["error"]["message"]
    assert "Traceback" not in capfd.readouterr().err


def test_what_transformers_server_has_besides_is_not_reached(port: int) -> None:
    """It would load other models, and forget this one."""
    for path in ("/load_model", "/reset", "/v1/responses"):
        assert ask(port, path, {"model": "x"})[0] == 404
    assert ask(port, front.TEXT, None)[0] == 404
    huge = {"Content-Length": str((4 << 20) + 1)}
    assert ask(port, front.TEXT, b"", **huge)[0] == 413


def test_a_taken_port_is_named_with_the_way_out() -> None:
    with front.listening(0) as server:
        port = server.server_address[1]
        with pytest.raises(MachineError, match=rf"port {port} .*port={port + 1}"):
            front.listening(port)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise SystemExit('no such model')", "ended at its start:\n.*no such model"),
        ("import time; time.sleep(60)", "has not answered in 0.5 s"),
    ],
)
def test_a_server_that_does_not_come_is_not_waited_for(
    program: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`timeit` runs what stands in the place of the model's name."""
    monkeypatch.setattr(front, "START_S", 0.5 if "sleep" in program else HANG_S)
    monkeypatch.setattr(
        front,
        "upstream_program",
        SimpleNamespace(__name__="timeit", VARIABLE="WORD", HEADER=HEADER),
    )
    model: Any = SimpleNamespace(name=program, folder=tmp_path / "model")
    with (
        pytest.raises(MachineError, match=f"(?s){said}"),
        front.transformers_serve(model, tmp_path),
    ):
        pass
