"""Documents of JSON lines, and of files that are one plain text.

Blank lines hold no document. A byte-order mark at the start of a file is removed, everything else
is kept as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import orjson

from data_prep.sources.inputs import InputConfig, OnError
from data_prep.sources.kinds import suffix_of
from data_prep.sources.pieces import Piece
from data_prep.sources.rejects import Document, Rejects, accept, field_of

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MOST_STRUCTURE_BYTES = 1 << 24
"""Of a line outside its strings: 100 MB of `[[],[],` would be 3 GB of lists."""
VALUE_SIGNS = (b",", b"[", b"{")
BLOCK_BYTES = 1 << 20
"""Of a long line, read or looked at: it fits in the cache, and its memory is used again."""
BACKSLASHES = re.compile(rb"\\*")


def read_jsonl(
    file: BinaryIO, piece: Piece, source: str, cfg: InputConfig, rejects: Rejects
) -> Iterator[Document]:
    """The documents of the lines that begin in the piece."""
    for record, place in read_objects(file, piece, cfg, rejects, (cfg.text_field,)):
        value = field_of(record, cfg.text_field)
        text = accept(value, piece.path, cfg, rejects, fields=record, **place)
        if text is not None:
            url = record.get(cfg.url_field)
            name = f"{piece.name}@{place['offset']}"
            yield Document(text, name, source, url if isinstance(url, str) else "")


def read_objects(
    file: BinaryIO, piece: Piece, cfg: InputConfig, rejects: Rejects, fields: Sequence[str]
) -> Iterator[tuple[dict[str, Any], dict[str, int | None]]]:
    """(object, its place as Rejects.add takes it) of the lines that begin in the piece.

    An object that has one of the fields twice is none of them.
    """
    may_be_one_value = suffix_of(piece.path) == ".json"
    if may_be_one_value and piece.start:
        if _is_one_value(file, piece, cfg, fields):
            return  # the piece that begins the file says so
        may_be_one_value = False
    for offset, line_number, line in read_lines(file, piece, cfg, rejects):
        place: dict[str, int | None] = {"line": line_number, "offset": offset}
        reason, detail, record = _record_of(line, fields)
        del line  # of a huge document as large as its text
        if may_be_one_value and reason in ("broken_json", "not_an_object"):
            rejects.add("not_json_lines", piece.path, detail)
            return
        may_be_one_value = False
        if reason:
            rejects.add(reason, piece.path, detail, **place)
            continue
        yield record, place


def _is_one_value(file: BinaryIO, piece: Piece, cfg: InputConfig, fields: Sequence[str]) -> bool:
    """Whether a .json file that can seek is no JSON lines, by its first line."""
    file.seek(0)
    head = Piece(piece.path, piece.size)
    first = next(read_lines(file, head, cfg, Rejects(OnError.quarantine)), None)
    return first is not None and bool(_record_of(first[2], fields)[0])


def _record_of(line: bytes | bytearray, fields: Sequence[str]) -> tuple[str, str, dict[str, Any]]:
    """(reason, detail, object) of a line; the reason is empty if it is an object to take."""
    # A value follows a comma or a bracket: few of those, in strings too, are few values. To count
    # them takes a fifth of the time.
    if (
        len(line) > MOST_STRUCTURE_BYTES
        and sum(map(line.count, VALUE_SIGNS)) > MOST_STRUCTURE_BYTES // 4
        and (size := structure_bytes(line)) > MOST_STRUCTURE_BYTES
    ):
        return "too_large", f"{size} bytes of its JSON are no text", {}
    try:
        record = parse_json(line)
    except UnicodeDecodeError as error:
        return "invalid_utf8", str(error), {}
    except ValueError as error:
        return "broken_json", str(error), {}
    if not isinstance(record, dict):
        return "not_an_object", type(record).__name__, {}
    for field in fields:
        if is_twice(line, field):
            return "ambiguous", f"the key {field}", {}
    return "", "", record


def structure_bytes(line: bytes | bytearray) -> int:
    """Bytes of a JSON text outside its strings: each may become an object of 60 bytes."""
    outside, start, is_inside = 0, 0, False
    while start < len(line):
        stop = min(start + BLOCK_BYTES, len(line))
        # On to the first character behind backslashes, so that no escape is cut in two.
        run = BACKSLASHES.match(line, stop - 1)
        if run and run[0]:
            stop = min(run.end() + 1, len(line))
        block = line[start:stop].replace(b"\\\\", b"").replace(b'\\"', b"")
        quotes = np.flatnonzero(np.frombuffer(block, np.uint8) == ord('"'))
        # Between two marks a string and what is no string take turns; its opening quote is its own.
        lengths = np.diff(quotes, prepend=0, append=len(block))
        outside += int(lengths[is_inside::2].sum())
        is_inside ^= bool(len(quotes) % 2)
        start = stop
    return outside


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with every key it was written with."""


def is_twice(line: bytes | bytearray, field: str) -> bool:
    """Whether a key on the way to a field stands twice in its object; JSON parsers take the last.

    Only lines that hold the quoted key twice are parsed again, which few do.
    """
    names = {field, *field.split(".")}
    if all(line.count(f'"{name}"'.encode()) < 2 for name in names):
        return False
    try:
        record = json.loads(line, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        return False  # parsed once already: only what orjson reads otherwise
    if any(key == field for key, _ in record):
        return sum(key == field for key, _ in record) > 1
    for name in field.split("."):
        values = [value for key, value in record if key == name]
        if len(values) != 1 or not isinstance(values[0], _Pairs):
            return len(values) > 1
        record = values[0]
    return False


def read_lines(
    file: BinaryIO, piece: Piece, cfg: InputConfig, rejects: Rejects
) -> Iterator[tuple[int, int | None, bytes | bytearray]]:
    """(offset, line number if known, line) for the lines that begin in the piece."""
    # Twice the limit, for JSON may escape a character by six bytes; `accept` is exact.
    limit = int(cfg.max_document_mb * 1e6) * 2
    offset, line_number = piece.start, 1 if piece.start == 0 else None
    if offset:
        file.seek(offset - 1)
        # A line that begins at `start` follows a line end. Not read beyond the piece: each of a
        # huge line's pieces would read the rest of it.
        most = None if piece.stop is None else piece.stop - offset + 1
        offset += _skip_line(file, most) - 1
    while piece.stop is None or offset < piece.stop:
        line = _read_line(file, limit + 1)
        if not line:
            return
        size = len(line)
        if len(line) > limit:
            size += 0 if line.endswith(b"\n") else _skip_line(file)
            rejects.add(
                "too_large", piece.path, f"a line of {size} bytes", line=line_number, offset=offset
            )
        else:
            if offset == 0 and line.startswith(BYTE_ORDER_MARK):
                line = line[len(BYTE_ORDER_MARK) :]
            if line := _strip(line):
                # Not held here meanwhile: a line of 1 GB would lie beside its text and its ids.
                found = [(offset, line_number, line)]
                del line
                yield found.pop()
        offset += size
        line_number = None if line_number is None else line_number + 1


def _read_line(file: BinaryIO, most: int) -> bytes | bytearray:
    """Bytes up to and including the next line end, or `most` bytes, or the rest of the file."""
    line = file.readline(min(most, BLOCK_BYTES))
    if len(line) < BLOCK_BYTES or line.endswith(b"\n"):
        return line
    # readline joins its blocks at the end: twice the memory. These bytes grow where they are.
    whole = bytearray(line)
    while len(whole) < most and not whole.endswith(b"\n"):
        if not (line := file.readline(min(most - len(whole), BLOCK_BYTES))):
            break
        whole += line
    return whole


def _strip(line: bytes | bytearray) -> bytes | bytearray:
    """line.strip(), but a long line, which is a bytearray, loses its end without a copy."""
    for end in (b"\n", b"\r"):
        if isinstance(line, bytearray) and line.endswith(end):
            line.pop()
    return line.strip() if line[:1].isspace() or line[-1:].isspace() else line


def _skip_line(file: BinaryIO, most: int | None = None) -> int:
    """Bytes up to and including the next line end, or `most` of them, or the rest of the file."""
    size = 0
    while most is None or size < most:
        chunk = file.readline(BLOCK_BYTES if most is None else min(BLOCK_BYTES, most - size))
        size += len(chunk)
        if not chunk or chunk.endswith(b"\n"):
            break
    return size


def parse_json(line: bytes | bytearray) -> Any:
    """The JSON value of a line; what orjson is too strict for (NaN, lone surrogates) json may take.

    Raises:
        UnicodeDecodeError: not UTF-8.
        ValueError: not JSON.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as strict:
        text = line.decode()  # json would guess UTF-16, and let surrogates pass
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise strict from None


def read_text(
    file: BinaryIO, piece: Piece, source: str, cfg: InputConfig, rejects: Rejects
) -> Iterator[Document]:
    """The file, if its text may be a document."""
    limit = int(cfg.max_document_mb * 1e6)
    content = file.read(limit + 1)
    if len(content) > limit:
        rejects.add("too_large", piece.path, f"more than {limit} bytes")
        return
    text = accept(content.removeprefix(BYTE_ORDER_MARK), piece.path, cfg, rejects)
    if text is not None:
        yield Document(text, piece.name, source)
