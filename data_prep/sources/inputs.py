"""The files of an input, cut into work units that depend on the input alone, never on who will do
the work.

    "web=crawl/*.jsonl.gz,code=src/"  --find_files-->  files with sizes, in order  --find_units-->  [Unit(pieces), ...]
    piece  --open_piece-->  binary stream, decompressed

Large plain jsonl files are cut by byte ranges; small files are packed many to a unit. A unit has
one source label.
"""

from __future__ import annotations

import bz2
import contextlib
import fnmatch
import io
import lzma
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, cast

from omegaconf import MISSING

from pipeline.errors import ConfigError, DataError

Format = Enum("Format", ["auto", "jsonl", "text", "parquet", "tar"])
OnError = Enum("OnError", ["fail", "quarantine"])
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
FORMATS = {
    ".jsonl": Format.jsonl,
    ".ndjson": Format.jsonl,
    ".parquet": Format.parquet,
    ".tar": Format.tar,
}
# Files of these kinds are taken from a folder when `include` does not say which.
TEXT_SUFFIXES = tuple(
    ".txt .text .md .rst .tex .html .htm .xml .py .pyi .ipynb .c .h .cc .cpp .hpp .cu .cuh .rs .go "
    ".java .kt .scala .js .jsx .ts .tsx .rb .php .pl .lua .r .jl .hs .ml .ex .erl .swift .m .cs "
    ".fs .sh .sql .css .json .yaml "
    ".yml .toml .cfg .ini".split()
)
MIN_UNIT_BYTES, MAX_UNIT_BYTES, UNITS_OF_SMALL_INPUT = 4 * 2**20, 512 * 2**20, 64
COMPRESSION_RATIO = 4  # typical of text; a compressed file counts for so many times its size


@dataclass
class InputConfig:
    """What a data_prep job reads."""

    input: str = MISSING
    """Files, folders or globs, separated by commas; local, s3://, gs://, http(s)://.
    `web=crawl/*.jsonl` labels its documents `web`; without a label the last name of the path is
    taken."""
    include: str = ""
    """Suffixes taken from folders, separated by commas (`.py,.md`); empty: every kind of file that
    is known.
    """
    exclude: str = ""
    """Glob patterns of paths that are left out, separated by commas
    (`*/site-packages/*,*.min.js`).
    """
    format: Format = Format.auto
    """jsonl, parquet, tar (WebDataset) or text (one file = one document); auto: by suffix, anything
    else is text.
    """
    text_field: str = "text"
    """Field or column of jsonl, parquet and json members that holds the text; dots go into nested
    objects.
    """
    url_field: str = "url"
    """Field with the document's address, for cleaning; it may be missing."""
    on_error: OnError = OnError.fail
    """A document that cannot be read ends the job (fail) or goes to rejects.jsonl (quarantine)."""
    max_document_mb: float = 100.0
    """Larger documents are rejected as too_large; bounds the memory of a worker."""
    unit_mb: float | None = None
    """Text of one work unit, MB; null: a 64th of the input, at least 4 and at most 512."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A file, or the lines of it that begin in a byte range."""

    path: str
    size: int
    """Bytes of the whole file as it is stored; -1: not known (http)."""
    start: int = 0
    stop: int | None = None
    """None: to the end."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest amount of work that is done, or done again, as a whole."""

    number: int
    source: str
    pieces: tuple[Piece, ...]
    weight: int
    """Bytes of text, estimated; for progress."""


def find_units(cfg: InputConfig) -> list[Unit]:
    """The work units of an input, in order.

    Raises:
        ConfigError: a setting contradicts itself.
        DataError: nothing is there, or it cannot be listed.
    """
    files = [(label, piece, _weight(piece)) for label, piece in find_files(cfg)]
    if not files:
        raise DataError(
            f"input={cfg.input}: no file was found. Folders are searched for "
            f"{cfg.include or 'known kinds of text'}; other kinds are taken with include=.suffix "
            "or by a glob."
        )
    total = sum(weight for _, _, weight in files)
    size = min(max(total // UNITS_OF_SMALL_INPUT, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    if cfg.unit_mb is not None:
        if cfg.unit_mb <= 0:
            raise ConfigError(f"unit_mb ({cfg.unit_mb}) must be above 0.")
        size = max(int(cfg.unit_mb * 1e6), 1)
    units: list[Unit] = []
    packed: list[Piece] = []
    label, filled = files[0][0], 0

    def close() -> None:
        nonlocal packed, filled
        if packed:
            units.append(Unit(len(units), label, tuple(packed), filled))
        packed, filled = [], 0

    for file_label, whole, whole_weight in files:
        for piece, weight in _cut(cfg, whole, whole_weight, size):
            if file_label != label or filled + weight > size:
                close()
            label = file_label
            packed.append(piece)
            filled += weight
    close()
    return units


def find_files(cfg: InputConfig) -> Iterator[tuple[str, Piece]]:
    """(label, whole file) for everything the input names, in the order of its parts and then by
    name.
    """
    include = tuple(s if s.startswith(".") else f".{s}" for s in _split(cfg.include))
    exclude = re.compile("|".join(fnmatch.translate(p) for p in _split(cfg.exclude)) or r"(?!)")
    for entry in _split(cfg.input):
        match = re.match(r"([\w.-]+)=(.+)", entry)
        label, path = match.groups() if match else (_label(entry), entry)
        for found, size in sorted(_list(path, include)):
            if not exclude.match(found):
                yield label, Piece(found, size)


def format_of(path: str, cfg: InputConfig) -> Format:
    """How a file is read."""
    if cfg.format is not Format.auto:
        return cfg.format
    name = path.split("?")[0].lower()
    if name.endswith(".tgz"):
        return Format.tar
    return FORMATS.get(os.path.splitext(_bare(name))[1], Format.text)


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
            f"{path} cannot be opened: {_reason(error)}. Nothing of its work unit was written."
        ) from error
    with raw:
        yield from _decompressed(raw, piece)


def _decompressed(raw: BinaryIO, piece: Piece) -> Iterator[BinaryIO]:
    path = piece.path
    size = os.fstat(raw.fileno()).st_size if "://" not in path else piece.size
    if size != piece.size:
        raise DataError(
            f"{path} has {size} bytes; it had {piece.size} when the job was planned. Prepare into "
            "another folder, or put the old file back."
        )
    name = path.split("?")[0].lower()
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
    """Decompressed content of a .zst file, frame after frame; a file that ends inside a frame
    raises EOFError.

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


def _split(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]


def _label(path: str) -> str:
    """Last name of a path that is no glob, without suffixes."""
    names = [
        n
        for n in re.sub(r"^\w+://", "", path).split("/")
        if n and n != "." and not re.search(r"[*?\[]", n)
    ]
    return names[-1].split(".")[0] or "text" if names else "text"


def _bare(name: str) -> str:
    """The name without the suffix of its compression."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix in COMPRESSIONS else name


def _is_known(name: str, include: tuple[str, ...]) -> bool:
    bare = _bare(name.lower())
    suffixes = include or (*TEXT_SUFFIXES, *FORMATS, ".tgz")
    return bare.endswith(suffixes) or bool(include) and name.lower().endswith(include)


def _list(path: str, include: tuple[str, ...]) -> Iterable[tuple[str, int]]:
    if "://" in path:
        return _list_remote(path, include)
    if re.search(r"[*?\[]", path) and not os.path.exists(path):
        import glob

        found = [p for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
        return [(p, os.path.getsize(p)) for p in found]
    if os.path.isdir(path):
        return _walk(Path(path), include)
    try:
        return [(path, os.path.getsize(path))]
    except OSError as error:
        raise DataError(
            f"input {path} is not there: {error.strerror}. Give files, folders or globs."
        ) from error


def _walk(folder: Path, include: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Files of known kinds below a folder; hidden ones, __pycache__ and links to folders are left
    out.
    """
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        for name in names:
            path = os.path.join(parent, name)
            if not name.startswith(".") and _is_known(name, include) and os.path.isfile(path):
                yield path, os.path.getsize(path)


def _list_remote(path: str, include: tuple[str, ...]) -> list[tuple[str, int]]:
    import fsspec

    scheme = path.partition("://")[0]
    try:
        fs, place = fsspec.core.url_to_fs(path)
        if scheme in ("http", "https"):
            return [(path, int(fs.info(place).get("size") or -1))]
        if re.search(r"[*?\[]", place):
            found = fs.glob(place, detail=True)
        elif fs.isfile(place):
            found = {place: fs.info(place)}
        else:
            found = {p: i for p, i in fs.find(place, detail=True).items() if _is_known(p, include)}
    except ImportError as error:
        raise ConfigError(
            f"{path}: {error}. Install the extra of this kind of storage, such as s3 or gcs."
        ) from error
    except Exception as error:  # every fsspec file system raises its own
        raise DataError(f"input {path} cannot be listed: {_reason(error)}.") from error
    sizes = {
        p.removeprefix(f"{scheme}://"): int(i["size"])
        for p, i in found.items()
        if i["type"] == "file"
    }
    return [(f"{scheme}://{p}", size) for p, size in sizes.items()]


def _open_remote(path: str) -> BinaryIO:
    import fsspec

    fs, place = fsspec.core.url_to_fs(path)
    # Many web servers know no byte ranges, so http is streamed (0) where the format lets it.
    is_streamed = path.startswith("http") and not path.lower().endswith(".parquet")
    file = fs.open(place, "rb", block_size=0 if is_streamed else 8 * 2**20)
    return cast(BinaryIO, io.BufferedReader(file, 1 << 20))


def _reason(error: BaseException) -> str:
    return (
        "there is no such file"
        if isinstance(error, FileNotFoundError)
        else f"{type(error).__name__}: {error}"
    )


def _weight(piece: Piece) -> int:
    packed = piece.path.lower().endswith((*COMPRESSIONS, ".tgz", ".parquet"))
    return max(piece.size, 1) * (COMPRESSION_RATIO if packed else 1)


def _cut(cfg: InputConfig, piece: Piece, weight: int, size: int) -> Iterator[tuple[Piece, int]]:
    """Byte ranges of about `size` where lines can be found from anywhere, else the piece."""
    path = piece.path.lower()
    can_seek = (
        format_of(path, cfg) is Format.jsonl
        and not path.endswith(COMPRESSIONS)
        and not path.startswith("http")
    )
    if not can_seek or piece.size <= size * 3 // 2:
        yield piece, weight
        return
    count = -(-piece.size // size)
    bounds = [piece.size * i // count for i in range(count + 1)]
    for start, stop in zip(bounds, bounds[1:]):
        yield Piece(piece.path, piece.size, start, stop), stop - start
