"""The documents of a work unit, one after the other, and an account of what could not be read.

    Unit -> pieces -> lines, rows, samples, files -> Document(text, id, source, url) or a reject

One reader for each format; a file that turns out to be damaged keeps what came before the damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from data_prep.sources.inputs import InputConfig, Unit
from data_prep.sources.kinds import Format, format_of
from data_prep.sources.lines import read_jsonl, read_text
from data_prep.sources.pieces import Damaged, Piece, open_piece
from data_prep.sources.rejects import Document, Rejects, is_damage, out_of_memory
from data_prep.sources.tables import read_arrow, read_parquet
from data_prep.sources.tars import read_tar
from pipeline.errors import DataError, PipelineError

READERS: dict[Format, Callable[..., Iterator[Document]]] = {
    Format.jsonl: read_jsonl,
    Format.text: read_text,
    Format.parquet: read_parquet,
    Format.arrow: read_arrow,
    Format.tar: read_tar,
}
POINTER, POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024
"""Begins what lies in a clone for a file that Git LFS has not fetched, and is always smaller."""


def read_documents(unit: Unit, cfg: InputConfig, rejects: Rejects) -> Iterator[Document]:
    """The documents of a unit in order; the rest goes to `rejects`."""
    return read_pieces(unit, cfg, rejects, READERS)


def read_pieces(
    unit: Unit, cfg: InputConfig, rejects: Rejects, readers: Mapping[Format, Callable[..., Any]]
) -> Iterator[Any]:
    """What the readers of each kind yield of a unit's pieces; damaged files go to `rejects`."""
    for piece in unit.pieces:
        kind = format_of(piece.path, cfg.format)
        assert kind is not None, "find_units refuses what has no kind"
        read = readers[kind]
        with open_piece(piece) as file:
            try:
                _check_no_pointer(file, piece)
                yield from read(file, piece, unit.source, cfg, rejects)
            except Exception as error:
                if problem := out_of_memory(error, piece.path):
                    raise problem from error
                if is_damage(error):
                    rejects.add("damaged_file", piece.path, f"{type(error).__name__}: {error}")
                elif "://" in piece.path and not isinstance(error, PipelineError):
                    raise DataError(
                        f"{piece.path} could not be read to its end ({type(error).__name__}: "
                        f"{error}). Run the same command again: finished units are kept."
                    ) from error
                else:
                    raise


def _check_no_pointer(file: BinaryIO, piece: Piece) -> None:
    """Raise Damaged of a file whose content Git LFS has left at the server: three lines of text."""
    if piece.size < POINTER_BYTES and file.peek(len(POINTER)).startswith(POINTER):  # type: ignore[attr-defined]
        raise Damaged("a pointer of Git LFS lies in its place: `git lfs pull` fetches it")
