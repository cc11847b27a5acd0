"""Every record of a file, whatever its format: for sets that documents are compared with.

    path -> JSON values of lines, rows as objects, members of samples, or one text

Nothing is passed over: the first record that cannot be read is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from data_prep.sources.inputs import InputConfig, OnError
from data_prep.sources.kinds import SEEKING, Format, check_known, format_of
from data_prep.sources.lines import parse_json, read_lines, read_text
from data_prep.sources.pieces import Piece, open_piece
from data_prep.sources.rejects import Rejects, is_damage, out_of_memory
from data_prep.sources.tables import open_table, row_bytes, slices
from data_prep.sources.tars import read_samples
from pipeline.errors import DataError, PipelineError


def read_records(piece: Piece) -> Iterator[Any]:
    """Strings, objects and lists of one whole file.

    Raises:
        ConfigError: it is of no kind that is known.
        DataError: it is damaged, or holds what cannot be read.
    """
    check_known([piece.path], Format.auto)
    kind, most = format_of(piece.path, Format.auto), InputConfig().max_document_mb * 4_000_000
    assert kind is not None, "check_known refuses what has no kind"
    try:
        with open_piece(piece) as file:
            if kind in SEEKING:
                names, batches = open_table(kind, file)
                for batch in batches(names):
                    for rows in slices(batch):
                        if (size := int(row_bytes(rows).max(initial=0))) > most:
                            raise DataError(f"{piece.path}: a row of {size} bytes is no record.")
                        yield from rows.to_pylist()
            else:
                yield from _READERS[kind](file, piece)
    except PipelineError:
        raise
    except Exception as error:
        if problem := out_of_memory(error, piece.path):
            raise problem from error
        if not (is_damage(error) or isinstance(error, OSError | ValueError | RecursionError)):
            raise
        raise DataError(
            f"{piece.path} cannot be read ({type(error).__name__}: {error})."
        ) from error


def _lines(file: BinaryIO, piece: Piece) -> Iterator[Any]:
    """The value of each line."""
    for offset, number, line in read_lines(file, piece, InputConfig(), Rejects(OnError.fail)):
        try:
            yield parse_json(line)
        except ValueError as error:
            raise DataError(
                f"{piece.path}, line {number} (byte {offset}) is not JSON: {error}."
            ) from error


def _text(file: BinaryIO, piece: Piece) -> Iterator[Any]:
    """The file."""
    for document in read_text(file, piece, "", InputConfig(), Rejects(OnError.fail)):
        yield document.text


def _samples(file: BinaryIO, piece: Piece) -> Iterator[Any]:
    """The text and JSON members of a tar's samples."""
    rejects = Rejects(OnError.fail)
    for sample in read_samples(file, piece, InputConfig(), rejects, whole=True):
        if sample.reason:
            rejects.add(sample.reason, piece.path, sample.detail, member=sample.key)
        for extension, content in sample.members.items():
            yield parse_json(content) if extension == "json" else content.decode()


_READERS = {Format.jsonl: _lines, Format.text: _text, Format.tar: _samples}
