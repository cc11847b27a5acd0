"""Token files of other projects become our datasets, without tokenizing again.

    python -m data_prep.import_tokens input=my_text_document.bin output=OUT tokenizer=tokenizer.json
    python -m data_prep.import_tokens 'input=web=a/*.bin,code=b/*.parquet' output=OUT
    tokenizer=T.json column=ids

    .bin with .idx      Megatron-LM (MMIDIDX, version 1)
    .bin                nanoGPT (uint16) or llm.c (its header); documents end, or begin, with end-of-document
    .parquet, .arrow    a column with a list of ids in each row, one row a document

The tokenizer is the one that made the ids; an id that it does not have ends the job. A document
that holds the end-of-document id inside is cut there, and empty ones are left out and counted. The
result is that of tokenize.py: OUT/train, OUT/validation, the same bytes for any number of workers
and tasks, and a killed job goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING

from data_prep.jobs import JobConfig, close_job, open_job, run_units
from data_prep.sources.inputs import InputConfig, find_files
from data_prep.sources.token_files import ColumnTokens, FlatTokens, MegatronTokens, TokenFile
from data_prep.tokens import dataset_writer
from data_prep.tokens.shard_writer import PARTS_PER_KEY_RANGE, PartWriter
from pipeline import cli, log
from pipeline.data.shard_format import VERSION, TokenizerIdentity, token_dtype
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError, DataError
from pipeline.files import sha256_of
from pipeline.log import logger

BATCH_TOKENS = 1 << 20
SPLITS = ("train", "validation")


@dataclass
class ImportConfig(JobConfig):
    """Settings of data_prep.import_tokens."""

    input: str = MISSING
    """Local files, folders or globs, separated by commas; `web=a/*.bin` labels its documents
    `web`.
    """
    tokenizer: str = MISSING
    """The tokenizer.json that made the ids, or the folder that holds it."""
    eod: str | None = None
    """Token, or its id, that ends every document; null: by the tokenizer's own special tokens."""
    column: str = "input_ids"
    """Column of .parquet and .arrow files with the ids."""
    validation_fraction: float = 0.005
    """Share of the documents, chosen by hash of their ids, that goes to OUT/validation; 0: none is
    written.
    """


@dataclass(frozen=True)
class ImportUnit:
    """A range of one file."""

    number: int
    source: str
    path: str
    begin: int
    end: int


def main(cfg: ImportConfig) -> None:
    """Do this task's share; the task that finds all units done makes the datasets.

    Raises:
        PipelineError: a file is damaged or not of a known kind, or the ids do not belong to the
            tokenizer.
    """
    log.setup()
    if not 0 <= cfg.validation_fraction < 1:
        raise ConfigError(
            f"validation_fraction ({cfg.validation_fraction}) must be at least 0 and below 1."
        )
    output = Path(cfg.output)
    tokenizer = Tokenizer.from_file(cfg.tokenizer, eod=cfg.eod)
    facts = TokenizerIdentity(tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod)
    files = find_files(InputConfig(input=cfg.input, include=".bin,.parquet,.arrow"))
    sizes = [
        (source, piece.path, piece.size)
        for source, piece in files
        if not piece.path.endswith(".idx")
    ]
    units = list(_units(sizes, cfg, facts.eod))
    digest = sha256_of(repr((sizes, units)).encode("utf-8", "surrogateescape"))
    open_job(output, {
        "job": "import_tokens", "version": VERSION, "input": cfg.input, "files": len(sizes), "units": len(units),
        "inputs_sha256": digest, "tokenizer": asdict(facts), "column": cfg.column,
        "validation_fraction": cfg.validation_fraction,
    })  # fmt: skip
    if dataset_writer.is_complete(output):
        close_job(output)
        logger.info(f"{output} is complete already")
        return
    dataset_writer.copy_tokenizer(output, tokenizer)
    text_bytes = np.stack([tokenizer.token_byte_lengths(at_start=first) for first in (True, False)])
    run = partial(import_unit, cfg=cfg, tokenizer=facts, text_bytes=text_bytes)
    if run_units(dataset_writer.markers(output), units, run, job=cfg, label="import"):
        dataset_writer.finalize(output, max_rejected_fraction=0)
    else:
        logger.info(
            f"this task is done; the last one, or python -m data_prep.finalize {output}, ends the "
            "job"
        )


def _units(files: list[tuple[str, str, int]], cfg: ImportConfig, eod: int) -> Iterator[ImportUnit]:
    number = 0
    for source, path, _ in files:
        for begin, end in _open(path, cfg.column, eod).ranges():
            yield ImportUnit(number, source, path, begin, end)
            number += 1
    if not number:
        raise DataError(
            f"input={cfg.input}: no tokens were found; .bin, .parquet and .arrow files are read."
        )


@cache
def _open(path: str, column: str, eod: int) -> TokenFile:
    """The file of a unit; an index is read once in each worker."""
    if "://" in path:
        raise ConfigError(f"{path}: token files are read from local disks only; copy it first.")
    file = Path(path)
    if file.suffix in (".parquet", ".arrow"):
        return ColumnTokens(file, column=column)
    if file.suffix != ".bin":
        raise ConfigError(f"{path}: token files end in .bin, .parquet or .arrow.")
    return MegatronTokens(file) if file.with_suffix(".idx").exists() else FlatTokens(file, eod=eod)


def import_unit(
    unit: ImportUnit, *, cfg: ImportConfig, tokenizer: TokenizerIdentity, text_bytes: np.ndarray
) -> dict[str, Any]:
    """Write a unit's parts; its marker is that of tokenize_job.tokenize_unit.

    Args:
        unit: what to read.
        cfg: the job.
        tokenizer: of the ids.
        text_bytes: (2, vocab_size) UTF-8 bytes of each id: first of a document, and later.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    names = SPLITS[: 2 if cfg.validation_fraction else 1]
    place = f"{unit.path}[{unit.begin}:{unit.end}]"
    sizes, empty = dict.fromkeys(names, 0), 0
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(PartWriter(
                dataset_writer.parts_folder(Path(cfg.output)), stem=f"{unit.number:08d}-{name}",
                key=unit.number * PARTS_PER_KEY_RANGE, source=unit.source, dtype=dtype,
            ))
            for name in names
        }  # fmt: skip
        documents = _open(unit.path, cfg.column, tokenizer.eod).read(unit.begin, unit.end)
        for stream in _streams(documents, tokenizer.eod):
            _check_ids(stream, tokenizer, place)
            stream, left_out = _drop_empty(stream, tokenizer.eod)
            empty += left_out
            for name, tokens in zip(names, _split(stream, tokenizer.eod, cfg.validation_fraction)):
                starts = np.flatnonzero(_begins(tokens, tokenizer.eod))
                writers[name].add(tokens.astype(dtype), starts, [place] * len(starts))
                sizes[name] += int(text_bytes[1, tokens].sum(dtype=np.int64))
                at_start, inside = text_bytes[:, tokens[starts]].sum(axis=1, dtype=np.int64)
                sizes[name] += int(at_start - inside)
        splits = {
            name: {"parts": [part.as_json() for part in writer.close()], "text_bytes": sizes[name]}
            for name, writer in writers.items()
        }
    return {"splits": splits, "rejects": {"empty": empty} if empty else {}}


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
    is_empty = (tokens == eod) & _begins(tokens, eod)
    return tokens[~is_empty], int(is_empty.sum())


def _check_ids(tokens: np.ndarray, tokenizer: TokenizerIdentity, place: str) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= tokenizer.vocab_size:
        raise DataError(
            f"{place} holds the id {high if low >= 0 else low}; the tokenizer has the ids 0 to "
            f"{tokenizer.vocab_size - 1}. Give the tokenizer.json that made these ids."
        )


def _split(tokens: np.ndarray, eod: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(train, validation): whole documents, by hash of their ids as <u4 without EOD."""
    if not fraction:
        return tokens, tokens[:0]
    ends = np.flatnonzero(tokens == eod)
    starts = np.concatenate(([0], ends[:-1] + 1))[: len(ends)]
    content = tokens.astype("<u4")
    held_out = np.array([
        int.from_bytes(hashlib.blake2b(content[a:b].tobytes(), digest_size=8).digest(), "little") < fraction * 2**64
        for a, b in zip(starts.tolist(), ends.tolist())
    ], bool)  # fmt: skip
    is_held_out = np.repeat(held_out, ends + 1 - starts)
    return tokens[~is_held_out], tokens[is_held_out]


if __name__ == "__main__":
    cli.run(main, ImportConfig, config="import_tokens", positional=["input", "output"])
