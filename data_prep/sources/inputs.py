"""The files of an input, cut into work units that depend on the input alone.

    "web=crawl/*.jsonl.gz,code=src/"  --find_files-->  files with sizes, in order
    files  --find_units-->  [Unit(pieces), ...]

Large plain jsonl files are cut by byte ranges; small files are packed many to a unit. A unit has
one source label.
"""

from __future__ import annotations

import fnmatch
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from data_prep.sources.kinds import (
    Format,
    check_known,
    format_of,
    is_compressed,
    is_pattern,
    name_of,
)
from data_prep.sources.listing import list_path, match_files, split_pattern
from data_prep.sources.pieces import Piece, printable
from pipeline.errors import ConfigError, DataError
from pipeline.log import logger

OnError = Enum("OnError", ["fail", "quarantine"])
MIN_UNIT_BYTES, MAX_UNIT_BYTES, UNITS_OF_SMALL_INPUT = 4 * 2**20, 512 * 2**20, 64
COMPRESSION_RATIO = 4  # typical of text; a compressed file counts for so many times its size


@dataclass
class InputConfig:
    """What a data_prep job reads."""

    input: str = MISSING
    """Files, folders or globs, separated by commas; local, s3://, gs://, http(s)://.
    `web=crawl/*.jsonl` labels its documents `web`; without a label the last name of the path is
    taken. What exists under a name with commas, brackets or `=` is that file or folder."""
    include: str = ""
    """Suffixes taken from folders, separated by commas (`.py,.md`); empty: all known kinds.
    """
    exclude: str = ""
    """Glob patterns of paths that are left out, separated by commas
    (`*/site-packages/*,*.min.js`).
    """
    format: Format = Format.auto
    """jsonl, parquet, arrow, tar (WebDataset) or text (one file = one document); auto: by suffix,
    and an unknown one is an error.
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
        ConfigError: a setting contradicts itself, or a file is of no kind that is known.
        DataError: nothing is there, or it cannot be listed.
    """
    if not 0 < cfg.max_document_mb < math.inf:
        raise ConfigError(f"max_document_mb ({cfg.max_document_mb}) must be above 0 and finite.")
    files = [(label, piece, _weight(piece)) for label, piece in find_files(cfg)]
    if not files:
        raise DataError(
            f"input={cfg.input}: no file was found. Folders are searched for "
            f"{cfg.include or 'known kinds of files'}; others are taken with include=.suffix or by "
            "a glob."
        )
    check_known([piece.path for _, piece, _ in files], cfg.format)
    size = _unit_bytes(cfg, sum(weight for _, _, weight in files))
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


def _unit_bytes(cfg: InputConfig, total: int) -> int:
    """Bytes of text in a unit, about, of an input of `total` bytes."""
    if cfg.unit_mb is None:
        return min(max(total // UNITS_OF_SMALL_INPUT, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    if not 0 < cfg.unit_mb < math.inf:
        raise ConfigError(f"unit_mb ({cfg.unit_mb}) must be above 0 and finite.")
    return max(int(cfg.unit_mb * 1e6), 1)


def find_files(cfg: InputConfig) -> Iterator[tuple[str, Piece]]:
    """(label, whole file) of all the input names, in the order of its parts, then by name."""
    include = tuple(s if s.startswith(".") else f".{s}" for s in _split(cfg.include.lower()))
    exclude = re.compile("|".join(fnmatch.translate(p) for p in _split(cfg.exclude)) or r"(?!)")
    seen: set[str] = set()
    names: dict[bool, set[int]] = {True: set(), False: set()}  # hashes: there may be millions
    twice, copies = 0, []
    for entry in split_paths(cfg.input):
        label, path = _parse(entry)
        for found, size in list_path(path, include):
            if not exclude.match(found):
                file = found if "://" in found else os.path.realpath(found)  # links, ./a and a
                twice += file in seen
                seen.add(file)
                is_packed = is_compressed(found)
                name = hash(os.path.splitext(found)[0] if is_packed else found)
                if name in names[not is_packed]:
                    copies.append(found)
                names[is_packed].add(name)
                yield label, Piece(found, size)
    if twice:
        logger.warning(
            f"input={cfg.input} names {twice} files more than once, also through links; all are "
            "read again."
        )
    if copies:
        logger.warning(
            f"input={cfg.input} holds {len(copies)} files compressed and not, such as {copies[0]}: "
            "both are read. Leave one kind out with exclude=."
        )


def split_paths(words: str) -> list[str]:
    """Paths between commas; a comma belongs to a path that exists with it.

    Only where a word alone names nothing are longer ones tried, the longest first: `a,b.jsonl` is
    that file, if there is one and no file `a` beside a file `b.jsonl`.
    """
    pieces = words.split(",")
    alone = [piece.strip() for piece in pieces if piece.strip()]
    if all(_is_there(piece) for piece in alone):
        return alone
    found: list[str] = []
    begin = 0
    while begin < len(pieces):
        for end in range(len(pieces), begin, -1):
            candidate = ",".join(pieces[begin:end])
            if end == begin + 1 or _is_there(candidate):
                break
        if candidate.strip():
            found.append(candidate if _is_there(candidate) else candidate.strip())
        begin = end
    return found


def _is_there(entry: str) -> bool:
    """Whether an entry names something; addresses are believed."""
    path = _parse(entry)[1]
    if "://" in path or os.path.exists(path):
        return True
    return is_pattern(path) and bool(match_files(path))


def _parse(entry: str) -> tuple[str, str]:
    """(label, path) of an entry; one that exists as it stands has no label of its own."""
    match = re.match(r"([\w.-]+)=(.+)", entry)
    if match is None or split_pattern(entry)[0]:
        return _label(entry), entry
    return match[1], match[2]


def _split(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]


def _label(path: str) -> str:
    """Last name of a path that is no glob, without suffixes."""
    folder, rest = ("", printable(path)) if "://" in path else split_pattern(path)
    names = [*folder.split("/"), *(n for n in rest.split("/") if not is_pattern(n))]
    names = [name for name in names if name not in ("", ".", "..") and not name.endswith(":")]
    return printable(names[-1].split(".")[0] or "text") if names else "text"


def _weight(piece: Piece) -> int:
    """Bytes of text in a file, estimated."""
    packed = is_compressed(piece.path) or name_of(piece.path).endswith((".tgz", ".parquet"))
    return max(piece.size, 1) * (COMPRESSION_RATIO if packed else 1)


def _cut(cfg: InputConfig, piece: Piece, weight: int, size: int) -> Iterator[tuple[Piece, int]]:
    """Byte ranges of about `size` where lines can be found from anywhere, else the piece."""
    can_seek = (
        format_of(piece.path, cfg.format) is Format.jsonl
        and not is_compressed(piece.path)
        and not piece.path.startswith(("http://", "https://"))
    )
    # A file of up to one and a half units stays whole: two halves would both be small.
    if not can_seek or piece.size <= size * 3 // 2:
        yield piece, weight
        return
    count = -(-piece.size // size)
    bounds = [piece.size * i // count for i in range(count + 1)]
    for start, stop in zip(bounds, bounds[1:]):
        yield Piece(piece.path, piece.size, start, stop), stop - start
