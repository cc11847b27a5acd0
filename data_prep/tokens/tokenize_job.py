"""Text to training shards: OUT/train and OUT/validation, the datasets that pipeline.train reads.

    python data_prep/tokenize.py input=corpus.jsonl output=OUT tokenizer=tokenizer.json
    python data_prep/tokenize.py 'input=web=crawl/*.jsonl.zst,code=s3://bucket/code/' output=OUT
    tokenizer=T.json sbatch --array=0-63 launch/tokenize.slurm input=... output=... tokenizer=...

Killed, or out of disk space: run the same command again. The result does not depend on the number
of workers or tasks. docs/data.md has the details.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING

from data_prep.jobs import JobConfig, close_job, open_job, run_units, task_of
from data_prep.sources.documents import read_documents
from data_prep.sources.inputs import InputConfig, Unit, find_units
from data_prep.sources.rejects import Document, Rejects
from data_prep.tokens import dataset_writer
from data_prep.tokens.encode import Encoder, EncoderName, get_encoder
from data_prep.tokens.split import SPLITS, UnitWriter, check_fraction, digest_text
from pipeline import cli, log
from pipeline.data.shard_format import VERSION, ShardLayout, TokenizerIdentity, token_dtype
from pipeline.data.tokenizer import Tokenizer
from pipeline.files import write_durably
from pipeline.log import logger

BATCH_CHARACTERS = 2 * 2**20  # text encoded at once


@dataclass
class TokenizeConfig(InputConfig, JobConfig):
    """Settings of data_prep/tokenize.py."""

    tokenizer: str = MISSING
    """A tokenizer.json, or the folder that holds one."""
    eod: str | None = None
    """Token, or its id, that ends every document; null: by the tokenizer's own special tokens."""
    encoder: EncoderName = EncoderName.auto
    """auto, gigatoken, tiktoken or hf; the ids are the same."""
    validation_fraction: float = 0.005
    """Share of the documents, chosen by hash of their text, that goes to OUT/validation; 0: none is
    written.
    """
    max_rejected_fraction: float = 0.01
    """on_error=quarantine: a larger share of rejected documents ends the job (empty ones do not
    count).
    """


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
    output = Path(cfg.output)
    tokenizer = Tokenizer.from_file(cfg.tokenizer, eod=cfg.eod)
    task, num_tasks = task_of(cfg)
    units = find_units(cfg)
    open_job(output, job_facts(cfg, units, tokenizer))
    if dataset_writer.is_complete(output):
        close_job(output)
        logger.info(f"{output} is complete already")
        return
    facts = TokenizerIdentity(tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod)
    encoder = get_encoder(cfg.tokenizer, facts.sha256, facts.eod, cfg.encoder)
    logger.info(
        f"{cfg.input}: {sum(unit.weight for unit in units) / 1e6:,.0f} MB in {len(units)} units; "
        f"encoder {encoder.name.name}; task {task} of {num_tasks}"
    )
    dataset_writer.copy_tokenizer(output, tokenizer)
    all_done = run_units(
        dataset_writer.markers(output),
        units,
        partial(tokenize_unit, cfg=replace(cfg, encoder=encoder.name), tokenizer=facts),
        job=cfg,
        label="tokenize",
        weight=lambda unit: unit.weight,
        unit_name="B",
        on_done=_Ceiling(cfg.max_rejected_fraction),
    )
    if all_done:
        dataset_writer.finalize(output, max_rejected_fraction=cfg.max_rejected_fraction)
    else:
        logger.info(
            f"task {task} is done; the last one, or python -m data_prep.finalize {output}, ends "
            "the job"
        )


def job_facts(cfg: TokenizeConfig, units: list[Unit], tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that the bytes of the result follow from."""
    digest = hashlib.sha256()
    for unit in units:
        digest.update(f"{unit.number} {unit.source}\n".encode())
        for piece in unit.pieces:
            digest.update(os.fsencode(f"{piece.path}\t{piece.size}\t{piece.start}\t{piece.stop}\n"))
    # on_error is not among them: a unit that passed with fail has nothing to quarantine.
    reading = ("format", "text_field", "max_document_mb")
    values = cli.to_dict(cfg)
    return {
        "job": "tokenize",
        "version": VERSION,
        "input": cfg.input,
        "files": sum(p.start == 0 for unit in units for p in unit.pieces),
        "units": len(units),
        "inputs_sha256": digest.hexdigest(),
        "tokenizer": asdict(
            TokenizerIdentity(tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod)
        ),
        "validation_fraction": cfg.validation_fraction,
        **{key: values[key] for key in reading},
    }


def tokenize_unit(
    unit: Unit, *, cfg: TokenizeConfig, tokenizer: TokenizerIdentity
) -> dict[str, Any]:
    """Write a unit's parts; its marker: parts, documents and bytes by split, rejects by reason."""
    output = Path(cfg.output)
    encoder = get_encoder(cfg.tokenizer, tokenizer.sha256, tokenizer.eod, cfg.encoder)
    rejects = Rejects(cfg.on_error)
    dtype = token_dtype(tokenizer.vocab_size)
    with UnitWriter(
        dataset_writer.parts_folder(output),
        number=unit.number,
        source=unit.source,
        layout=ShardLayout(dtype),
        fraction=cfg.validation_fraction,
    ) as writer:
        batches = {name: _Batch(encoder, tokenizer.eod, dtype, name, writer) for name in SPLITS}
        for document in read_documents(unit, cfg, rejects):
            digest = digest_text(document.text) if cfg.validation_fraction else 0
            size = partial(_text_bytes, document.text)
            batches[writer.split_of(digest, document.id, size)].add(document)
        for batch in batches.values():
            batch.flush()
        result = writer.close()
    if rejects.rows:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejects.rows)
        write_durably(
            dataset_writer.rejects_path(output, unit.number),
            lines.encode("utf-8", "backslashreplace"),
        )
    return result | {"rejects": dict(Counter(row["reason"] for row in rejects.rows))}


def _text_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


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
        # Document i ends at ends[i], one place later for each end mark before it: everything else
        # is text, in the order of `ids`.
        ends = np.cumsum(lengths + 1)
        tokens = np.full(ends[-1], self._eod, self._dtype)
        is_text = np.ones(len(tokens), bool)
        is_text[ends - 1] = False
        tokens[is_text] = ids
        text_bytes = sum(map(_text_bytes, self._texts))
        self._writer.add(self._split, tokens, ends - lengths - 1, self._ids, text_bytes)
        self._texts, self._ids, self._waiting = [], [], 0


class _Ceiling:
    """Ends a hopeless job early: too much was rejected among the first documents already."""

    LEAST = 1000  # documents, before a share means anything

    def __init__(self, fraction: float) -> None:
        self._fraction, self._documents, self._rejects = fraction, 0, Counter[str]()

    def __call__(self, result: dict[str, Any]) -> None:
        parts = [part for split in result["splits"].values() for part in split["parts"]]
        self._documents += sum(part["documents"] for part in parts)
        self._rejects.update(result["rejects"])
        if self._documents + self._rejects.total() >= self.LEAST:
            dataset_writer.check_rejected(self._documents, self._rejects, self._fraction)
