"""A file of an input, or a range of one, and the stream of its bytes, decompressed."""

from __future__ import annotations

import bz2
import contextlib
import io
import lzma
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, cast

from data_prep.sources.kinds import SEEKING, Format, format_of, name_of
from data_prep.sources.listing import reason_of
from pipeline.errors import DataError
from pipeline.redaction import redact


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

    What is secret in the environment plays no part: ids must not depend on the machine.
    """
    return redact(os.fsencode(path).decode("utf-8", "backslashreplace"), {})


@contextlib.contextmanager
def open_piece(piece: Piece) -> Iterator[BinaryIO]:
    """The piece's file from its first byte, decompressed by its suffix; a plain file can seek.

    Raises:
        DataError: it is not there any more, or has another size than when the job was planned.
    """
    path = piece.path
    try:
        raw = _open_remote(path) if "://" in path else open(path, "rb", buffering=1 << 20)  # noqa: SIM115
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
    name = name_of(path)
    if name.endswith((".gz", ".tgz")):
        from isal import igzip

        stream = cast(BinaryIO, igzip.open(raw, "rb"))
    elif name.endswith(".zst"):
        stream = cast(BinaryIO, io.BufferedReader(ZstdStream(raw), 1 << 20))
    elif name.endswith(".bz2"):
        stream = cast(BinaryIO, bz2.open(raw, "rb"))
    elif name.endswith(".xz"):
        stream = cast(BinaryIO, lzma.open(raw, "rb"))
    else:
        stream = raw
    with stream:
        yield stream


class ZstdStream(io.RawIOBase):
    """Decompressed content of a .zst file, frame after frame; EOFError inside a frame.

    zstandard's own stream_reader takes a truncated file for a short one.
    """

    CHUNK_BYTES = 1 << 14  # bounds what one step can inflate to

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


def _open_remote(path: str) -> BinaryIO:
    import fsspec

    fs, place = fsspec.core.url_to_fs(path)
    # Many web servers know no byte ranges, so http is streamed (0) where the format lets it.
    is_streamed = path.startswith("http") and format_of(path, Format.auto) not in SEEKING
    file = fs.open(place, "rb", block_size=0 if is_streamed else 8 * 2**20)
    return cast(BinaryIO, io.BufferedReader(file, 1 << 20))
