"""A file of an input, or a range of one, and the stream of its bytes, decompressed."""

from __future__ import annotations

import bz2
import contextlib
import hashlib
import io
import lzma
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, BinaryIO, cast

from data_prep.sources.kinds import SEEKING, Format, format_of, is_compressed, name_of
from pipeline.errors import DataError
from pipeline.files import open_regular
from pipeline.redaction import HIDDEN, is_signed, redact
from pipeline.remote import connect, reason_of

PIECE_BYTES = 1 << 16
"""What is lost in front of a damage, at most."""
FIRST_BYTES = 1 << 9
"""Fed to a new stream; twice as much each time."""
MOST_INFLATION, FREE_BYTES = 1100, 1 << 28
"""Ratio of a whole file, the only one; gzip cannot exceed 1,032 to 1. Nothing is said before."""


class Damaged(Exception):
    """A file that is not what its suffix says."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A file, or the lines of it that begin in a byte range."""

    path: str
    size: int
    """Bytes of the whole file as it is stored; -1: not known (http)."""
    start: int = 0
    stop: int | None = None
    """None: to the end."""

    @property
    def name(self) -> str:
        """The path as UTF-8 can hold it, for ids; names on disk may be any bytes."""
        return printable(self.path)


@lru_cache(maxsize=1024)
def printable(path: str) -> str:
    """The path as it may be written: bytes that are no UTF-8 escaped, an address without secrets.

    What is secret in the environment plays no part: ids must not depend on the machine. Where a
    query names the file (?file=a.jsonl) and signs nothing, a digest of it tells files apart.
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    shown = redact(text, {})
    _, _, query = text.partition("?") if shown.endswith(f"?{HIDDEN}") else ("", "", "")
    if query and not is_signed(query):
        shown += f"#{hashlib.sha256(query.encode()).hexdigest()[:8]}"
    return shown


@contextlib.contextmanager
def open_piece(piece: Piece) -> Iterator[BinaryIO]:
    """The piece's file from its first byte, decompressed by its suffix; a plain file can seek.

    Raises:
        DataError: it is not there any more, or has another size than when the job was planned.
    """
    path = piece.path
    try:
        raw = _open_remote(path) if "://" in path else open_regular(path, buffering=1 << 20)
    except Exception as error:  # every fsspec file system raises its own
        raise DataError(
            f"{path} cannot be opened: {reason_of(error)}. Nothing of its work unit was written."
        ) from error
    with raw:
        yield from _decompressed(raw, piece)


def _decompressed(raw: BinaryIO, piece: Piece) -> Iterator[BinaryIO]:
    """The stream that the suffix asks for, once the file has its planned size."""
    path = piece.path
    size = os.fstat(raw.fileno()).st_size if "://" not in path else piece.size
    if size != piece.size:
        raise DataError(
            f"{path} has {size} bytes; it had {piece.size} when the job was planned. Prepare into "
            "another folder, or put the old file back."
        )
    name, stored = name_of(path), raw
    counted = _Counted(raw)
    if is_compressed(path) or name.endswith(".tgz"):
        raw = cast(BinaryIO, io.BufferedReader(counted, 1 << 20))
    if name.endswith((".gz", ".tgz")):
        from isal import igzip

        stream = cast(BinaryIO, igzip.open(raw, "rb"))
    elif name.endswith(".zst"):
        stream = cast(BinaryIO, io.BufferedReader(ZstdStream(raw), 1 << 20))
    elif name.endswith(".bz2"):
        stream = cast(BinaryIO, io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor), 1 << 20))
    elif name.endswith(".xz"):
        stream = cast(BinaryIO, io.BufferedReader(_Streams(raw, _new_xz), 1 << 20))
    else:
        stream = raw
    if stream is not stored:
        stream = cast(BinaryIO, io.BufferedReader(_Inflated(stream, counted), PIECE_BYTES))
    with stream:
        yield stream


class _Counted(io.RawIOBase):
    """A file that says how much of it was read."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self.num_bytes = raw, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        self.num_bytes += len(data)
        return len(data)


class _Inflated(io.RawIOBase):
    """What a compressed file holds; Damaged where it is a bomb.

    A few megabytes of .zst may stand for terabytes, which would be read for days, and dropped.
    """

    def __init__(self, stream: BinaryIO, stored: _Counted) -> None:
        self._stream, self._stored, self.num_bytes = stream, stored, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # igzip raises for all that was asked for where only the end is damaged: ask for little.
        data: bytes = self._stream.read1(min(len(buffer), PIECE_BYTES))  # type: ignore[attr-defined]
        buffer[: len(data)] = data
        self.num_bytes += len(data)
        if self.num_bytes > FREE_BYTES + MOST_INFLATION * self._stored.num_bytes:
            raise Damaged(
                f"{self.num_bytes} bytes came out of {self._stored.num_bytes}: more than "
                f"{MOST_INFLATION} to 1 is no text"
            )
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


class ZstdStream(io.RawIOBase):
    """Decompressed content of a .zst file, frame after frame; EOFError inside a frame.

    zstandard's own stream_reader takes a truncated file for a short one.
    """

    CHUNK_BYTES = 1 << 12  # one step inflates to at most 128 MB: 128 KiB a block of 4 bytes

    def __init__(self, raw: BinaryIO) -> None:
        """Read from `raw`, which is closed with this stream."""
        import zstandard

        self._raw = raw
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._frame: Any = None
        self._left = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as one step of decompression goes; 0 at the end."""
        while not self._ready:
            data = self._left or self._raw.read(self.CHUNK_BYTES)
            self._left = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._ready = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        """Close the file too."""
        self._raw.close()
        super().close()


# Of .xz alone: 13 zeros are a whole .lzma file.
_new_xz = partial(lzma.LZMADecompressor, lzma.FORMAT_XZ)


class _Streams(io.RawIOBase):
    """Decompressed content of a .bz2 or .xz file, stream after stream; EOFError inside one.

    Python's own readers take whatever begins no stream for the end of the file: one flipped bit in
    the head of a stream, of which pbzip2 writes one for each megabyte, would drop all that follows.
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], Any]) -> None:
        self._raw, self._new = raw, new
        self._stream: Any = new()  # None: between two streams
        self._data, self._at = b"", 0
        self._most = FIRST_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            if self._stream is None or self._stream.needs_input:
                data = self._next()
                if not data and self._stream is None:
                    return 0
                if not data:
                    raise EOFError("compressed file ended before the end of its last stream")
            if self._stream is None:
                data = data.lstrip(b"\0")  # padding between and behind streams
                if not data:
                    continue
                self._stream = self._new()
            content = self._stream.decompress(data, len(buffer))
            if self._stream.eof:
                self._at -= len(self._stream.unused_data)
                self._stream, self._most = None, FIRST_BYTES
            if content:
                buffer[: len(content)] = content
                return len(content)

    def _next(self) -> bytes:
        """A piece of the file, about as much as its stream has had.

        A stream copies what lies behind its end: at 64 KiB for each of 14 bytes, which is an empty
        .bz2, a file of them would be copied 2,000 times.
        """
        if self._at == len(self._data):
            self._data, self._at = self._raw.read(PIECE_BYTES), 0
        data = self._data[self._at : self._at + self._most]
        self._at += len(data)
        self._most = min(2 * self._most, PIECE_BYTES)
        return data

    def close(self) -> None:
        self._raw.close()
        super().close()


def _open_remote(path: str) -> BinaryIO:
    fs, place = connect(path)
    # Many web servers know no byte ranges, so http is streamed (0) where the format lets it.
    is_streamed = path.startswith("http") and format_of(path, Format.auto) not in SEEKING
    file = fs.open(place, "rb", block_size=0 if is_streamed else 8 * 2**20)
    return cast(BinaryIO, io.BufferedReader(file, 1 << 20))
