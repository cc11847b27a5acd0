"""The documents of a work unit, one after the other, and an account of what could not be read.

    Unit -> pieces -> lines, rows, members, files -> Document(text, id, source, url) | Rejects.add(...)

Nothing is dropped silently: what is not yielded is in the rejects, with the place and one of
REASONS. Blank lines of a jsonl file hold no document. A byte-order mark at the start of a file is
removed, everything else is kept as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import orjson

from data_prep.sources.inputs import (
    Format,
    InputConfig,
    OnError,
    Piece,
    Unit,
    format_of,
    open_piece,
)
from pipeline.errors import DataError, PipelineError

REASONS = {
    "broken_json": "the line is not JSON",
    "not_an_object": "the line is JSON, but not an object",
    "missing_field": "the text field, column or member is not there",
    "not_a_string": "the text is null, a number, a list or an object",
    "invalid_utf8": "the text is not UTF-8",
    "lone_surrogate": "the text holds half of a surrogate pair (\\ud800 to \\udfff)",
    "nul": "the text holds U+0000: binary data",
    "too_large": "the document is larger than max_document_mb",
    "empty": "the text has no characters; never fails a job",
    "damaged_file": "the file ends too early, or is not what its suffix says; what came before the damage is kept",
}
PARSERS = {
    "zlib",
    "gzip",
    "igzip",
    "lzma",
    "zstandard",
    "tarfile",
    "pyarrow",
}  # where their errors are defined
TEXT_MEMBERS = ("txt", "text", "md")  # of a WebDataset sample, before json
ROWS_PER_BATCH = 256


@dataclass(frozen=True, slots=True)
class Document:
    """One text, as it goes through data_prep."""

    text: str
    id: str
    """File and place: `crawl/a.jsonl@1234` (byte), `a.parquet#17` (row), `a.tar/0001` (sample), or
    the file.
    """
    source: str
    url: str = ""


@dataclass
class Rejects:
    """What could not be read, under a policy."""

    on_error: OnError
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Lines of rejects.jsonl."""

    def add(self, reason: str, path: str, detail: str = "", **place: int | str | None) -> None:
        """Record one document, or one damaged file.

        Args:
            reason: one of REASONS.
            path: the file.
            detail: what the parser said.
            place: offset (byte, of the decompressed file), line (from 1), row (from 0) or member;
                None: not known.

        Raises:
            DataError: the policy is to fail, and the text is not merely empty.
        """
        where = {key: value for key, value in place.items() if value is not None}
        if self.on_error is OnError.fail and reason != "empty":
            spot = ", ".join(f"{key} {value}" for key, value in where.items())
            raise DataError(
                f"{path}{', ' if spot else ''}{spot}: {reason}: "
                f"{REASONS[reason]}{f' ({detail})' if detail else ''}. Mend the file and run "
                "again, or go on with on_error=quarantine, which lists such documents."
            )
        self.rows.append({"file": path, **where, "reason": reason, "detail": detail[:200]})


def read_documents(unit: Unit, cfg: InputConfig, rejects: Rejects) -> Iterator[Document]:
    """The documents of a unit in order; the rest goes to `rejects`."""
    for piece in unit.pieces:
        read = READERS[format_of(piece.path, cfg)]
        with open_piece(piece) as file:
            try:
                yield from read(file, piece, unit.source, cfg, rejects)
            except Exception as error:
                if _is_damage(error):
                    rejects.add("damaged_file", piece.path, f"{type(error).__name__}: {error}")
                elif "://" in piece.path and not isinstance(error, PipelineError):
                    raise DataError(
                        f"{piece.path} could not be read to its end ({type(error).__name__}: "
                        f"{error}). Run the same command again: finished units are kept."
                    ) from error
                else:
                    raise


def _is_damage(error: Exception) -> bool:
    """The file is to blame, not the disk, the network or we: errors of parsers, bare OSErrors of
    bz2 and pyarrow.
    """
    package = type(error).__module__.lstrip("_").split(".")[0].split("_")[0]
    is_bare = type(error) is OSError and error.errno is None
    return isinstance(error, EOFError | _Damaged) or is_bare or package in PARSERS


class _Damaged(Exception):
    """A file that is not what its suffix says."""


def _read_jsonl(
    file: BinaryIO, piece: Piece, source: str, cfg: InputConfig, rejects: Rejects
) -> Iterator[Document]:
    for offset, line_number, line in _lines(file, piece, cfg, rejects):
        place: dict[str, int | None] = {"line": line_number, "offset": offset}
        try:
            record = _parse(line)
        except UnicodeDecodeError as error:
            rejects.add("invalid_utf8", piece.path, str(error), **place)
            continue
        except ValueError as error:
            rejects.add("broken_json", piece.path, str(error), **place)
            continue
        if not isinstance(record, dict):
            rejects.add("not_an_object", piece.path, type(record).__name__, **place)
            continue
        text = _accept(_field(record, cfg.text_field), piece.path, cfg, rejects, **place)
        if text is not None:
            url = record.get(cfg.url_field)
            yield Document(
                text, f"{piece.path}@{offset}", source, url if isinstance(url, str) else ""
            )


def _lines(
    file: BinaryIO, piece: Piece, cfg: InputConfig, rejects: Rejects
) -> Iterator[tuple[int, int | None, bytes]]:
    """(offset, line number if known, line) for the lines that begin in the piece."""
    limit = (
        int(cfg.max_document_mb * 1e6) * 2
    )  # JSON may escape a character by six bytes; `_accept` is exact
    offset, line_number = piece.start, 1 if piece.start == 0 else None
    if offset:
        file.seek(offset - 1)
        offset += _skip_line(file) - 1  # a line that begins at `start` follows a line end
    while piece.stop is None or offset < piece.stop:
        line = file.readline(limit + 1)
        if not line:
            return
        size = len(line)
        if len(line) > limit:
            size += 0 if line.endswith(b"\n") else _skip_line(file)
            rejects.add(
                "too_large", piece.path, f"a line of {size} bytes", line=line_number, offset=offset
            )
        elif line_text := (line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line).strip():
            yield offset, line_number, line_text
        offset += size
        line_number = None if line_number is None else line_number + 1


def _skip_line(file: BinaryIO) -> int:
    """Bytes up to and including the next line end."""
    size = 0
    while chunk := file.readline(1 << 24):
        size += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return size


def _parse(line: bytes) -> Any:
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


def _field(record: Any, name: str) -> Any:
    """Value of a field, dots going into nested objects; KeyError's stand-in `...` where it is
    missing.
    """
    if isinstance(record, dict) and name in record:
        return record[name]
    for part in name.split("."):
        if not isinstance(record, dict) or part not in record:
            return ...
        record = record[part]
    return record


def _accept(
    value: Any, path: str, cfg: InputConfig, rejects: Rejects, **place: int | str | None
) -> str | None:
    """The text if it may become a document; else None, and the reason is recorded."""
    if value is ...:
        rejects.add("missing_field", path, f"no {cfg.text_field}", **place)
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            rejects.add("invalid_utf8", path, str(error), **place)
            return None
    if not isinstance(value, str):
        rejects.add("not_a_string", path, type(value).__name__, **place)
        return None
    reason, detail = "", ""
    if not value:
        reason = "empty"
    elif len(value) > cfg.max_document_mb * 1e6:
        reason, detail = "too_large", f"{len(value)} characters"
    elif "\0" in value:
        reason, detail = "nul", f"at character {value.index(chr(0))}"
    elif not value.isascii() and not _is_encodable(value):
        reason = "lone_surrogate"
    if reason:
        rejects.add(reason, path, detail, **place)
        return None
    return str(value)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(
    file: BinaryIO, piece: Piece, source: str, cfg: InputConfig, rejects: Rejects
) -> Iterator[Document]:
    limit = int(cfg.max_document_mb * 1e6)
    content = file.read(limit + 1)
    if len(content) > limit:
        rejects.add("too_large", piece.path, f"more than {limit} bytes")
        return
    text = _accept(content.removeprefix(b"\xef\xbb\xbf"), piece.path, cfg, rejects)
    if text is not None:
        yield Document(text, piece.path, source)


def _read_parquet(
    file: BinaryIO, piece: Piece, source: str, cfg: InputConfig, rejects: Rejects
) -> Iterator[Document]:
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file)
    names = parquet.schema_arrow.names
    root = cfg.text_field if cfg.text_field in names else cfg.text_field.split(".")[0]
    if root not in names:
        rejects.add("missing_field", piece.path, f"no column {root}; columns: {', '.join(names)}")
        return
    inner = cfg.text_field.removeprefix(root).lstrip(".")
    has_url = cfg.url_field in names and cfg.url_field != root
    row = 0
    for batch in parquet.iter_batches(
        ROWS_PER_BATCH, columns=[root, cfg.url_field] if has_url else [root]
    ):
        urls = batch.column(cfg.url_field).to_pylist() if has_url else [None] * batch.num_rows
        for value, url in zip(_column(batch.column(root), inner), urls):
            text = _accept(value, piece.path, cfg, rejects, row=row)
            if text is not None:
                yield Document(
                    text, f"{piece.path}#{row}", source, url if isinstance(url, str) else ""
                )
            row += 1


def _column(column: Any, inner: str) -> list[Any]:
    """Values of a column as bytes, so that one that is not UTF-8 does not take the others with
    it.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    for name in inner.split(".") if inner else []:
        if not pa.types.is_struct(column.type) or column.type.get_field_index(name) < 0:
            return [...] * len(column)
        column = pc.struct_field(column, name)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return list(column.to_pylist())


def _read_tar(
    file: BinaryIO, piece: Piece, source: str, cfg: InputConfig, rejects: Rejects
) -> Iterator[Document]:
    webdataset = _webdataset()
    for sample in _or_damaged(webdataset.group_by_keys(_members(webdataset, file, piece, rejects))):
        key = sample["__key__"]
        value: Any = next((sample[name] for name in TEXT_MEMBERS if name in sample), ...)
        url: Any = ""
        if value is ... and "json" in sample:
            try:
                record = _parse(sample["json"])
            except ValueError as error:
                rejects.add("broken_json", piece.path, str(error), member=f"{key}.json")
                continue
            value, url = (
                _field(record, cfg.text_field),
                record.get(cfg.url_field) if isinstance(record, dict) else "",
            )
        text = _accept(value, piece.path, cfg, rejects, member=key)
        if text is not None:
            yield Document(text, f"{piece.path}/{key}", source, url if isinstance(url, str) else "")


def _members(
    webdataset: Any, file: BinaryIO, piece: Piece, rejects: Rejects
) -> Iterator[dict[str, Any]]:
    """The files of a tar; webdataset would pass over names without an extension, which belong to no
    sample.
    """
    for member in webdataset.tar_file_iterator(file):
        if webdataset.base_plus_ext(member["fname"])[0] is None:
            rejects.add(
                "missing_field", piece.path, "a name without an extension", member=member["fname"]
            )
        else:
            yield {**member, "__url__": piece.path}


def _or_damaged(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The samples; webdataset's ValueError (a name that comes twice) is damage."""
    try:
        yield from samples
    except ValueError as error:
        raise _Damaged(str(error)) from error


def _webdataset() -> Any:
    """webdataset.tariterators, without torch: webdataset imports it where it finds it, 1.5 s and
    200 MB a worker.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        # Makes `import torch` raise ImportError
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import webdataset.tariterators
    finally:
        if hidden:
            del sys.modules["torch"]
    return webdataset.tariterators


READERS = {
    Format.jsonl: _read_jsonl,
    Format.text: _read_text,
    Format.parquet: _read_parquet,
    Format.tar: _read_tar,
}
