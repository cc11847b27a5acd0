"""Web servers that lie: more than was asked for, a byte a while, somebody else's address."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from pipeline import remote
from pipeline.errors import ConfigError, DataError

# fsspec keeps its connections open for the life of the process.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
ENDLESS = b"HTTP/1.1 200 OK\r\n\r\n"


@contextlib.contextmanager
def server(*answers: bytes, drip: bool = False, endless: bool = False) -> Iterator[str]:
    """An address that answers each connection in turn with these bytes, then the last ones.

    drip, endless: after the last ones it goes on.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer(connection: socket.socket, content: bytes) -> None:
            goes_on = (drip or endless) and content == answers[-1]
            with contextlib.suppress(OSError), connection:
                connection.recv(65536)
                connection.sendall(content)
                while goes_on:
                    connection.sendall(b"x" if drip else b"x" * 65536)
                    time.sleep(0.02 if drip else 0)

        def serve() -> None:
            for number in range(100):
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                content = answers[min(number, len(answers) - 1)]
                threading.Thread(target=answer, args=(connection, content), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/file"


@pytest.mark.parametrize(
    "url, way",
    [("s3://a/b", r'pip install -e "\.\[s3\]" in'), ("abfs://a/b", r"Install adlfs to .*\.$")],
)
def test_the_package_of_a_protocol_is_named(url: str, way: str, monkeypatch) -> None:
    """A protocol that no extra brings was answered with an extra of its name, which does not exist."""

    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install adlfs to access Azure")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ConfigError, match=f"{url} needs the package of its protocol: {way}"):
        remote.connect(url)


def test_a_small_file_without_end_is_left_at_its_limit():
    with server(ENDLESS, endless=True) as url, pytest.raises(DataError, match="more than 100000"):
        remote.read_small(*remote.connect(url), most=100_000)


def test_a_server_that_drips_is_left_in_time(monkeypatch):
    """Each byte comes in time, all of them never."""
    monkeypatch.setattr(remote, "REQUEST_S", 0.3)
    with (
        server(ENDLESS, drip=True) as url,
        pytest.raises(DataError, match="the server is too slow"),
    ):
        remote.read_small(*remote.connect(url))


@pytest.mark.parametrize("status", ["206 Partial Content", "200 OK"])
def test_of_a_range_that_goes_on_only_the_range_is_read(status):
    head = f"HTTP/1.1 {status}\r\n\r\n".encode() + bytes(range(256))
    with server(head, endless=True) as url:
        data = remote.read_range(*remote.connect(url), 3, 9)
    first = 3 if status.startswith("200") else 0
    assert data == bytes(range(first, first + 6))


def test_a_range_that_a_table_is_read_by_takes_no_more_memory_than_asked_for():
    """Parquet is read by fsspec's own ranges, which takes all that a server sends for one."""
    size = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nConnection: close\r\n\r\n"
    with server(size, b"HTTP/1.1 206 Partial Content\r\n\r\n", endless=True) as url:
        file_system, place = remote.connect(url)
        with file_system.open(place, "rb", block_size=100) as file:
            with pytest.raises(DataError, match="more than the [0-9]+ bytes asked for"):
                file.read(10)


@pytest.mark.parametrize(
    ("target", "followed"),
    [
        ("ftp://example.org/x", False),
        ("https://127.0.0.1:1/x", False),
        ("/other", True),
    ],
)
def test_a_redirect_is_followed_to_the_same_scheme_only(target, followed):
    redirect = f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()
    with server(redirect, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi") as url:
        if followed:
            assert remote.read_small(*remote.connect(url)) == b"hi"
            return
        with pytest.raises(DataError, match="which is not followed"):
            remote.read_small(*remote.connect(url))


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("169.254.169.254", True),
        ("0.0.0.0", True),
        ("[::1]", True),
        ("[::ffff:127.0.0.1]", True),
        ("[fe80::1]", True),
        ("93.184.216.34", False),
        ("10.1.2.3", False),
    ],
)
def test_this_machine_and_its_link_are_known_by_any_name(host, is_local):
    import asyncio

    import yarl

    assert asyncio.run(remote._is_local(yarl.URL(f"http://{host}/x"))) is is_local


def test_a_redirect_from_outside_to_this_machine_is_refused(monkeypatch):
    """A dataset's server could read the cloud's credentials from 169.254.169.254 through us."""

    async def only_second_is_local(url):
        return url.path == "/secret"

    monkeypatch.setattr(remote, "_is_local", only_second_is_local)
    redirect = b"HTTP/1.1 307 X\r\nLocation: /secret\r\nContent-Length: 0\r\n\r\n"
    with server(redirect, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi") as url:
        with pytest.raises(DataError, match="/secret, which is not followed") as caught:
            remote.read_small(*remote.connect(url))
    assert remote.reason_of(FileNotFoundError("x")) == "there is no such file"
    wrapped = FileNotFoundError("x")
    wrapped.__cause__ = caught.value
    assert "is not followed" in remote.reason_of(wrapped), "fsspec calls all faults missing files"


def test_an_address_of_no_known_kind_is_named():
    with pytest.raises(ConfigError, match="cannot be opened"):
        remote.connect("gopher://x/y")
