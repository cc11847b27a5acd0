"""Work units of token files, and one unit's way into parts.

files -> ranges -> ImportUnit -> documents -> streams of ids, checked -> UnitWriter

An end-of-document id inside a document cuts it; empty documents are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources.inputs import InputConfig, find_files
from data_prep.sources.pieces import Piece
from data_prep.sources.token_files import (
    ColumnTokens,
    FlatTokens,
    MegatronTokens,
    TokenFile,
    reading,
)
from data_prep.tokens import dataset_writer
from data_prep.tokens.split import SPLITS, UnitWriter, digest_ids
from pipeline.data.shard_format import ShardLayout, TokenizerIdentity, token_dtype
from pipeline.errors import ConfigError, DataError
from pipeline.files import open_regular, sha256_of
from pipeline.redaction import redact

BATCH_TOKENS = 1 << 20


@dataclass(frozen=True)
class ImportUnit:
    """A range of one file."""

    number: int
    source: str
    path: str
    begin: int
    end: int


def find_token_units(
    source: str, *, column: str, tokenizer: TokenizerIdentity
) -> tuple[list[ImportUnit], int, str]:
    """(units in order, number of files, sha256 of both lists) of an input.

    Args:
        source: see InputConfig.input.
        column: of .parquet and .arrow files.
        tokenizer: that made the ids.

    Raises:
        ConfigError: a file is not of a known kind.
        DataError: a file is damaged, or no tokens were found.
    """
    files = [
        (label, piece.path, piece.size)
        for label, piece in find_files(InputConfig(input=source, include=".bin,.parquet,.arrow"))
        if not piece.path.endswith(".idx")
    ]
    units: list[ImportUnit] = []
    for label, path, _ in files:
        with reading(path):
            ranges = _open(path, column, tokenizer).ranges()
        units += [ImportUnit(len(units) + i, label, path, *both) for i, both in enumerate(ranges)]
    if not units:
        raise DataError(
            f"input={source}: no tokens were found; .bin, .parquet and .arrow files are read."
        )
    digest = sha256_of(redact(repr((files, units)), {}).encode("utf-8", "surrogateescape"))
    return units, len(files), digest


@cache
def _open(path: str, column: str, tokenizer: TokenizerIdentity) -> TokenFile:
    """The file of a unit; an index is read once in each worker."""
    if "://" in path:
        raise ConfigError(f"{path}: token files are read from local disks only; copy it first.")
    file = Path(path)
    suffix, index = file.suffix.lower(), file.with_suffix(".idx")
    for opened in (file, index) if index.exists() else (file,):
        open_regular(opened).close()  # a pipe would be waited for, without end
    if suffix in (".parquet", ".arrow"):
        return ColumnTokens(file, column=column)
    if suffix != ".bin":
        raise ConfigError(f"{path}: token files end in .bin, .parquet or .arrow, uncompressed.")
    if index.exists():
        return MegatronTokens(file)
    return FlatTokens(file, eod=tokenizer.eod, vocab_size=tokenizer.vocab_size)


def import_unit(
    unit: ImportUnit,
    *,
    output: Path,
    column: str,
    tokenizer: TokenizerIdentity,
    token_byte_lengths: np.ndarray,
    validation_fraction: float,
) -> dict[str, Any]:
    """Write a unit's parts; its marker is that of tokenize_job.tokenize_unit.

    Args:
        unit: what to read.
        output: of the job.
        column: of .parquet and .arrow files.
        tokenizer: of the ids.
        token_byte_lengths: (2, vocab_size) UTF-8 bytes of each id: first of a document, and later.
        validation_fraction: share of the documents that is held out.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    place = f"{Piece(unit.path, 0).name}[{unit.begin}:{unit.end}]"
    empty = 0
    with UnitWriter(
        dataset_writer.parts_folder(output),
        number=unit.number,
        source=unit.source,
        layout=ShardLayout(dtype),
        fraction=validation_fraction,
    ) as writer:
        for stream in _streams(_documents(unit, column, tokenizer), tokenizer.eod):
            _check_ids(stream, tokenizer, place)
            kept, left_out = _drop_empty(stream, tokenizer.eod)
            empty += left_out
            is_validation = np.zeros(len(kept), bool)
            if validation_fraction:
                is_validation = _choose(kept, tokenizer.eod, writer, place, token_byte_lengths)
            for name, tokens in zip(SPLITS, (kept[~is_validation], kept[is_validation])):
                if len(tokens):
                    starts = np.flatnonzero(_begins(tokens, tokenizer.eod))
                    text_bytes = _text_bytes(tokens, starts, token_byte_lengths)
                    ids = [place] * len(starts)
                    writer.add(name, tokens.astype(dtype), starts, ids, text_bytes)
        result = writer.close()
    return result | {"rejects": {"empty": empty} if empty else {}}


def _documents(unit: ImportUnit, column: str, tokenizer: TokenizerIdentity) -> Iterator[np.ndarray]:
    """Ids of each document of a unit."""
    with reading(unit.path):
        yield from _open(unit.path, column, tokenizer).read(unit.begin, unit.end)


def _streams(documents: Iterator[np.ndarray], eod: int) -> Iterator[np.ndarray]:
    """Documents joined to streams of about BATCH_TOKENS ids, each document with EOD at its end."""
    end = np.array([eod], np.int64)
    waiting: list[np.ndarray] = []
    size = 0
    for document in documents:
        waiting.append(document)
        if not len(document) or document[-1] != eod:
            waiting.append(end)
        size += len(document)
        if size >= BATCH_TOKENS:
            yield np.concatenate(waiting).astype(np.int64)
            waiting, size = [], 0
    if waiting:
        yield np.concatenate(waiting).astype(np.int64)


def _begins(tokens: np.ndarray, eod: int) -> np.ndarray:
    """(n,) bool: a document begins here; tokens[0] begins one."""
    return np.concatenate(([True], tokens[:-1] == eod))[: len(tokens)]


def _drop_empty(tokens: np.ndarray, eod: int) -> tuple[np.ndarray, int]:
    """The stream without documents that are an end mark only, and their number."""
    is_empty = (tokens == eod) & _begins(tokens, eod)
    return tokens[~is_empty], int(is_empty.sum())


def _text_bytes(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> int:
    """Bytes of the text of whole documents; their first tokens may add less than inside a text."""
    at_start, inside = lengths[:, tokens[starts]].sum(axis=1, dtype=np.int64)
    return int(lengths[1, tokens].sum(dtype=np.int64) + at_start - inside)


def _check_ids(tokens: np.ndarray, tokenizer: TokenizerIdentity, place: str) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= tokenizer.vocab_size:
        raise DataError(
            f"{place} holds the id {high if low >= 0 else low}; the tokenizer has the ids 0 to "
            f"{tokenizer.vocab_size - 1}. Give the tokenizer.json that made these ids."
        )


def _choose(
    tokens: np.ndarray, eod: int, writer: UnitWriter, place: str, lengths: np.ndarray
) -> np.ndarray:
    """(n,) bool: the token is of a document that is held out, by the digest of its ids."""
    ends = np.flatnonzero(tokens == eod)
    starts = np.concatenate(([0], ends[:-1] + 1))[: len(ends)]
    first = np.zeros(1, np.int64)
    held_out = [
        writer.split_of(
            digest_ids(tokens[a:b]), place, partial(_text_bytes, tokens[a : b + 1], first, lengths)
        )
        == "validation"
        for a, b in zip(starts.tolist(), ends.tolist())
    ]
    return np.repeat(np.array(held_out, bool), ends + 1 - starts)
