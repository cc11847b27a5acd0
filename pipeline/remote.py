"""Files at addresses that fsspec understands, from servers that may lie; for both packages.

    connect                   file system and place of an address
    read_small, read_range    a body of bounded size, within REQUEST_S
    reason_of                 what a foreign file system's error says

A web server may send more than was asked for, a byte a minute, or somebody else's address: a
redirect to another scheme, or from outside to this machine or the cloud's metadata service
(169.254.169.254), is refused, and nothing stops whoever wants that address from naming it.
"""

from __future__ import annotations

import ipaddress
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.files import MOST_BYTES

if TYPE_CHECKING:
    import aiohttp

SILENCE_S = 30.0
"""Without a byte (http)."""
REQUEST_S = 600.0
"""For one small file, or one range of 8 MiB: 14 kB/s."""
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # protocol -> extra of pyproject.toml


class TooLarge(DataError):
    """A body that has more bytes than a file of its kind may have."""


def connect(url: str) -> tuple[Any, str]:
    """(fsspec file system, place inside it) of an address.

    Raises:
        ConfigError: the protocol is unknown or its package is not installed.
    """
    import fsspec

    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        options["get_client"] = partial(_client, silence_s=SILENCE_S)
    try:
        file_system, place = fsspec.core.url_to_fs(url, **options)
        return file_system, place
    except ImportError as error:
        way = f"{error}."  # fsspec names the package
        if (extra := EXTRAS.get(protocol)) is not None:
            way = f'pip install -e ".[{extra}]" in the folder of this project.'
        raise ConfigError(f"{url} needs the package of its protocol: {way}") from None
    except ValueError as error:
        raise ConfigError(f"{url} cannot be opened: {error}") from None


def read_small(file_system: Any, place: str, *, most: int = MOST_BYTES) -> bytes:
    """The whole of a file of at most `most` bytes.

    Raises:
        TooLarge: it is larger.
        DataError: it takes longer than REQUEST_S.
        Exception: whatever the file system raises.
    """
    # A size spares http a question; a block size of 0 streams the body.
    options = {"block_size": 0, "size": 1} if _is_http(file_system) else {}
    with file_system.open(place, "rb", **options) as file:
        data = _read(file, most + 1, place)
    if len(data) > most:
        raise TooLarge(f"{place} has more than {most} bytes; such a file has less.")
    return data


def read_range(file_system: Any, place: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file.

    Raises:
        OSError: there are fewer.
        Exception: whatever the file system raises.
    """
    if not _is_http(file_system):
        data = bytes(file_system.cat_file(place, start=start, end=stop))
    else:
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        with file_system.open(place, "rb", block_size=0, size=1, headers=headers) as file:
            if file.r.status != 206:  # it sends the whole file
                _read(file, start, place, keep=False)
            data = _read(file, stop - start, place)
    if len(data) != stop - start:
        raise OSError(f"{len(data)} bytes instead of {stop - start}")
    return data


def _read(file: Any, size: int, place: str, *, keep: bool = True) -> bytes:
    """Up to `size` bytes of a stream, in pieces: a server that drips is left after REQUEST_S."""
    deadline, data, done = time.monotonic() + REQUEST_S, bytearray(), 0
    while done < size and (block := file.read(min(1 << 20, size - done))):
        done += len(block)
        if keep:
            data += block
        if time.monotonic() > deadline:
            raise DataError(f"{place}: {done} bytes in {REQUEST_S:.0f} s; the server is too slow.")
    return bytes(data)


def reason_of(error: BaseException) -> str:
    """What a foreign file system's error says, in words."""
    cause: BaseException | None = error
    while cause is not None:  # fsspec takes whatever goes wrong for a missing file
        if isinstance(cause, PipelineError):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return f"{type(error).__name__}: {error}"


def _is_http(file_system: Any) -> bool:
    return "http" in file_system.protocol


async def _client(*, silence_s: float, **options: Any) -> aiohttp.ClientSession:
    """What fsspec sends its requests with: no body beyond its range, no redirect anywhere."""
    import aiohttp

    class Response(aiohttp.ClientResponse):
        async def read(self) -> bytes:
            """The body of a range, of which fsspec would take whatever comes."""
            first, _, last = self.request_info.headers.get("Range", "").rpartition("-")
            begin = first.rpartition("=")[2]
            is_range = begin.isdecimal() and last.isdecimal()
            most = int(last) - int(begin) + 1 if is_range else MOST_BYTES
            body = bytearray()
            async for block in self.content.iter_any():
                body += block
                if len(body) > most:
                    self.close()
                    raise DataError(f"{self.url} sends more than the {most} bytes asked for.")
            return bytes(body)

    redirects = aiohttp.TraceConfig()
    redirects.on_request_redirect.append(_check_redirect)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=silence_s, sock_read=silence_s)
    return aiohttp.ClientSession(
        **options, response_class=Response, trace_configs=[redirects], timeout=timeout
    )


async def _check_redirect(_: Any, __: Any, step: aiohttp.TraceRequestRedirectParams) -> None:
    """Refuse a redirect to another scheme, or from outside to this machine or its link."""
    import yarl

    headers = step.response.headers
    target = step.url.join(yarl.URL(headers.get("Location") or headers.get("URI") or ""))
    is_elsewhere = target.scheme != step.url.scheme
    if is_elsewhere or (await _is_local(target) and not await _is_local(step.url)):
        step.response.close()
        raise DataError(
            f"{step.url} sends on to {target}, which is not followed: only to the same scheme, and "
            "not from outside to this machine. If that is the place, give its address itself."
        )


async def _is_local(url: Any) -> bool:
    """Whether a host is this machine, or on its link only, as cloud metadata services are."""
    import asyncio

    try:
        found = await asyncio.get_running_loop().getaddrinfo(url.host, url.port)
    except OSError:
        return False  # then nothing can be fetched from it either
    hosts = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    hosts = [getattr(host, "ipv4_mapped", None) or host for host in hosts]
    return any(host.is_loopback or host.is_link_local or host.is_unspecified for host in hosts)
