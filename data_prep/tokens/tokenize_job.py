"""Text to training shards: OUT/train and OUT/validation, the datasets that pipeline.train reads.

    python data_prep/tokenize.py input=corpus.jsonl output=OUT tokenizer=tokenizer.json
    python data_prep/tokenize.py 'input=web=crawl/*.jsonl.zst,code=s3://bucket/code/' output=OUT
    tokenizer=T.json sbatch --array=0-63 launch/tokenize.slurm input=... output=... tokenizer=...

Killed, or out of disk space: run the same command again. The result does not depend on the number
of workers or tasks. docs/data.md has the details.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources.documents import read_documents
from data_prep.sources.inputs import InputConfig, Unit, find_units
from data_prep.sources.kinds import Format
from data_prep.sources.rejects import Document, Rejects
from data_prep.sources.text import text_bytes
from data_prep.tokens import canaries, dataset_writer, pii_tally
from data_prep.tokens.canaries import CanaryConfig
from data_prep.tokens.dataset_job import (
    DatasetJobConfig,
    identity_of,
    job_facts,
    open_dataset_job,
    record_rejects,
    run_dataset_job,
)
from data_prep.tokens.encode import Encoder, EncoderName, get_encoder
from data_prep.tokens.pii_tally import PiiTally
from data_prep.tokens.split import SPLITS, UnitWriter, check_fraction, digest_text
from pipeline import cli, log
from pipeline.data.shard_format import VERSION, ShardLayout, TokenizerIdentity, token_dtype
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import DataError
from pipeline.files import sha256_of
from pipeline.log import logger

BATCH_CHARACTERS = 2 * 2**20  # text encoded at once
PIECE_TOKENS = 2**21  # marked and handed on at once: all of a batch, a part of a huge document
CANARY = "canary"  # id of the documents that are planted
DIGEST_BYTES = 16  # of a removed text: two different ones never share it by chance


@dataclass
class TokenizeConfig(DatasetJobConfig):
    """Settings of data_prep/tokenize.py."""

    encoder: EncoderName = EncoderName.auto
    """auto, gigatoken, tiktoken or hf; the ids are the same."""
    remove: str | None = None
    """Documents that are left out wherever the input has the same text: a file, or several, read as
    input= is; null: none.
    """
    pii_max_rate: float | None = None
    """Largest share of documents with e-mail addresses, IP addresses, telephone numbers or keys, as
    data_prep.clean finds them; what is found stands in OUT/pii.json. 1: all are let through; null:
    nothing is looked for.
    """
    canaries: CanaryConfig = field(default_factory=CanaryConfig)
    """Made-up secrets that are planted in OUT/train, to measure what a model gives away."""


def run() -> None:
    """Entry point."""
    cli.run(main, TokenizeConfig, config="tokenize", positional=["input", "output"])


def main(cfg: TokenizeConfig) -> None:
    """Do this task's share; the task that finds all units done makes the datasets.

    Raises:
        PipelineError: see docs/data.md.
    """
    log.setup()
    check_fraction(cfg.validation_fraction)
    canaries.check(cfg.canaries)
    pii_tally.check_rate(cfg.pii_max_rate)
    tokenizer = Tokenizer.from_file(cfg.tokenizer, eod=cfg.eod)
    units = find_units(cfg)
    reading = ("format", "text_field", "max_document_mb")
    facts = job_facts(cfg, units, tokenizer, job="tokenize", version=VERSION, reading=reading)
    if cfg.remove is not None:
        removed = b"".join(sorted(_removed(cfg)))
        facts["removed_sha256"] = sha256_of(removed)
        logger.info(f"remove={cfg.remove}: {len(removed) // DIGEST_BYTES:,} different texts")
    if cfg.pii_max_rate is not None:
        facts["pii_max_rate"] = cfg.pii_max_rate
    planted: dict[int, list[tuple[int, str]]] = {}
    if cfg.canaries.each:
        facts["canaries"] = asdict(cfg.canaries)
        planted = canaries.places(cfg.canaries, units)
    if not open_dataset_job(Path(cfg.output), facts):
        return
    if cfg.canaries.each:
        canaries.write_list(cfg.canaries, Path(cfg.output))
    identity = identity_of(tokenizer)
    encoder = get_encoder(cfg.tokenizer, identity.sha256, identity.eod, cfg.encoder)
    logger.info(f"encoder {encoder.name.name}")
    job = replace(cfg, encoder=encoder.name)
    run = partial(tokenize_unit, cfg=job, tokenizer=identity, planted=planted)
    run_dataset_job(cfg, units, tokenizer, run, label="tokenize")


def tokenize_unit(
    unit: Unit,
    *,
    cfg: TokenizeConfig,
    tokenizer: TokenizerIdentity,
    planted: dict[int, list[tuple[int, str]]],
) -> dict[str, Any]:
    """Write a unit's parts; its marker: parts, documents and bytes by split, rejects by reason.

    planted: unit number to its canaries, as canaries.places gives them.
    """
    output = Path(cfg.output)
    encoder = get_encoder(cfg.tokenizer, tokenizer.sha256, tokenizer.eod, cfg.encoder)
    rejects, removed, pii = Rejects(cfg.on_error), _removed(cfg), PiiTally()
    dtype = token_dtype(tokenizer.vocab_size)
    with UnitWriter(
        dataset_writer.parts_folder(output),
        number=unit.number,
        source=unit.source,
        layout=ShardLayout(dtype),
        fraction=cfg.validation_fraction,
    ) as writer:
        batches = {name: _Batch(encoder, tokenizer.eod, dtype, name, writer) for name in SPLITS}
        places = planted.get(unit.number, [])
        for document, is_planted in _with_canaries(unit, cfg, rejects, places):
            if is_planted:
                writer.plant()
                batches["train"].add(document)
                continue
            if removed and _digest(document.text) in removed:
                rejects.add("removed", document.id)
                continue
            if cfg.pii_max_rate is not None:
                pii.add(document.text)
            digest = digest_text(document.text) if cfg.validation_fraction else 0
            size = partial(text_bytes, document.text)
            batches[writer.split_of(digest, document.id, size)].add(document)
        for batch in batches.values():
            batch.flush()
        result = writer.close()
    if cfg.pii_max_rate is not None:
        result["pii"] = {unit.source: asdict(pii)}
    return result | {"rejects": record_rejects(output, unit, rejects)}


def _with_canaries(
    unit: Unit, cfg: TokenizeConfig, rejects: Rejects, planted: list[tuple[int, str]]
) -> Iterator[tuple[Document, bool]]:
    """A unit's documents, and canaries, of which True is said.

    Each canary comes before the first document that begins at its byte or behind it.
    """
    size, waiting = 0, deque(planted)
    for document in read_documents(unit, cfg, rejects):
        while waiting and waiting[0][0] <= size:
            yield Document(waiting.popleft()[1], CANARY, unit.source), True
        size += text_bytes(document.text)
        yield document, False
    for _, text in waiting:
        yield Document(text, CANARY, unit.source), True


def _removed(cfg: TokenizeConfig) -> frozenset[bytes]:
    """Digests of the texts that are to be left out."""
    if cfg.remove is None:
        return frozenset()
    names = (cfg.remove, cfg.format, cfg.text_field, cfg.max_document_mb)
    return _digests_of(*names)


@lru_cache(maxsize=1)
def _digests_of(
    remove: str, kind: Format, text_field: str, max_document_mb: float
) -> frozenset[bytes]:
    """The same of files, read once a process.

    Raises:
        DataError: they hold no document, or one that cannot be read: it would stay in.
    """
    cfg = InputConfig(
        input=remove, format=kind, text_field=text_field, max_document_mb=max_document_mb
    )
    rejects = Rejects(cfg.on_error)
    found = frozenset(
        _digest(document.text)
        for unit in find_units(cfg)
        for document in read_documents(unit, cfg, rejects)
    )
    if not found:
        raise DataError(
            f"remove={remove}: there is no document in it, so nothing would be left out."
        )
    return found


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


class _Batch:
    """Documents of one split on their way from text to a unit's parts; encoded many at a time."""

    def __init__(
        self, encoder: Encoder, eod: int, dtype: np.dtype, split: str, writer: UnitWriter
    ) -> None:
        self._encoder, self._eod, self._dtype = encoder, eod, dtype
        self._split, self._writer = split, writer
        self._texts: list[str] = []
        self._ids: list[str] = []
        self._waiting = 0

    def add(self, document: Document) -> None:
        self._texts.append(document.text)
        self._ids.append(document.id)
        self._waiting += len(document.text)
        if self._waiting >= BATCH_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Encode what waits, and put the end-of-document id after each document."""
        if not self._texts:
            return
        ids, lengths = self._encoder.encode(self._texts)
        size, names = sum(map(text_bytes, self._texts)), self._ids
        self._texts, self._ids, self._waiting = [], [], 0
        for tokens, starts, here in with_end_marks(ids, lengths, self._eod, self._dtype):
            self._writer.add(self._split, tokens, starts, names[here], size)
            size = 0  # counted once


def with_end_marks(
    ids: np.ndarray, lengths: np.ndarray, eod: int, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray, slice]]:
    """Documents one behind the other, each with its end mark, in pieces of PIECE_TOKENS.

    Args:
        ids: (sum of lengths,) of all documents.
        lengths: (documents,) ids of each.

    Yields:
        (tokens, places in them where documents start, which documents these are).
    """
    # Document i ends before ends[i], one place later for each end mark before it: everything else
    # is text, in the order of `ids`. Whole, the marked ids and the mask that places them were three
    # bytes a token of a huge document, beside the four of `ids`.
    ends = np.cumsum(lengths + 1)
    starts = ends - lengths - 1
    for begin in range(0, int(ends[-1]), PIECE_TOKENS):
        stop = min(begin + PIECE_TOKENS, int(ends[-1]))
        first, last = np.searchsorted(ends - 1, (begin, stop))
        tokens = np.full(stop - begin, eod, dtype)
        is_text = np.ones(stop - begin, bool)
        is_text[ends[first:last] - 1 - begin] = False
        tokens[is_text] = ids[begin - first : stop - last]
        low, high = np.searchsorted(starts, (begin, stop))
        yield tokens, starts[low:high] - begin, slice(low, high)
