"""A job that makes datasets of documents: what tokenizing text and packing dialogues share.

open_dataset_job -> run_dataset_job (this task's units) -> all done? -> finalize
unit -> rejects, parts -> marker -> Ceiling
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from data_prep.jobs import JobConfig, close_job, open_job, run_units, task_of
from data_prep.sources.inputs import InputConfig, Unit
from data_prep.sources.rejects import Rejects
from data_prep.tokens import dataset_writer
from data_prep.tokens.split import documents_in
from pipeline import cli
from pipeline.data.shard_format import TokenizerIdentity
from pipeline.data.tokenizer import Tokenizer
from pipeline.files import write_durably
from pipeline.log import logger


@dataclass
class DatasetJobConfig(InputConfig, JobConfig):
    """What becomes datasets, and how much of it may be bad."""

    tokenizer: str = MISSING
    """A tokenizer.json, or the folder that holds one."""
    eod: str | None = None
    """Token, or its id, that ends every document; null: by the tokenizer's own special tokens."""
    validation_fraction: float = 0.005
    """Share of the documents, chosen by hash of their text, that goes to OUT/validation; 0: none is
    written.
    """
    max_rejected_fraction: float = 0.01
    """on_error=quarantine: a larger share of rejected documents ends the job (empty ones do not
    count).
    """


def identity_of(tokenizer: Tokenizer) -> TokenizerIdentity:
    """What the manifest will say of it."""
    return TokenizerIdentity(tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod)


def job_facts(
    cfg: DatasetJobConfig,
    units: list[Unit],
    tokenizer: Tokenizer,
    *,
    job: str,
    version: int,
    reading: tuple[str, ...],
) -> dict[str, Any]:
    """What the bytes of the result follow from, whatever the documents are.

    Args:
        cfg: of the job.
        units: of its input.
        tokenizer: of its datasets.
        job: name of the command.
        version: of the shard format.
        reading: settings that say how files are read.
    """
    digest = hashlib.sha256()
    for unit in units:
        digest.update(f"{unit.number} {unit.source}\n".encode())
        for piece in unit.pieces:
            digest.update(f"{piece.name}\t{piece.size}\t{piece.start}\t{piece.stop}\n".encode())
    # on_error is not among them: a unit that passed with fail has nothing to quarantine.
    values = cli.to_dict(cfg)
    return {
        "job": job,
        "version": version,
        "input": cfg.input,
        "files": sum(p.start == 0 for unit in units for p in unit.pieces),
        "units": len(units),
        "inputs_sha256": digest.hexdigest(),
        "tokenizer": asdict(identity_of(tokenizer)),
        "validation_fraction": cfg.validation_fraction,
        **{key: values[key] for key in reading},
    }


def open_dataset_job(output: Path, facts: dict[str, Any]) -> bool:
    """Claim the folder for a job; false: it is done already.

    Raises:
        ConfigError: the folder holds another job.
    """
    open_job(output, facts)
    if not dataset_writer.is_complete(output):
        return True
    close_job(output)
    logger.info(f"{output} is complete already")
    return False


def run_dataset_job(
    cfg: DatasetJobConfig,
    units: list[Unit],
    tokenizer: Tokenizer,
    run: Callable[[Any], dict[str, Any]],
    *,
    label: str,
) -> None:
    """Do this task's units; the task that finds all of them done makes the datasets.

    Raises:
        PipelineError: a unit failed, or too much was rejected.
    """
    output = Path(cfg.output)
    task, num_tasks = task_of(cfg)
    size_mb = sum(unit.weight for unit in units) / 1e6
    logger.info(f"{cfg.input}: {size_mb:,.0f} MB in {len(units)} units; task {task} of {num_tasks}")
    try:
        dataset_writer.copy_tokenizer(output, tokenizer)
        all_done = run_units(
            dataset_writer.markers(output),
            units,
            run,
            job=cfg,
            label=label,
            weight=lambda unit: unit.weight,
            unit_name="B",
            on_done=_Ceiling(cfg.max_rejected_fraction),
        )
        if all_done:
            dataset_writer.finalize(output, max_rejected_fraction=cfg.max_rejected_fraction)
    except FileNotFoundError:
        # Another task has ended the job in the meantime, and removed the work folder.
        if not dataset_writer.is_complete(output):
            raise
    if dataset_writer.is_complete(output):
        close_job(output)  # a task that came late may have made the work folder anew
    else:
        logger.info(
            f"task {task} is done; the last one, or python -m data_prep.finalize {output}, ends "
            "the job"
        )


def record_rejects(output: Path, unit: Unit, rejects: Rejects) -> dict[str, int]:
    """Write the unit's part of rejects.jsonl; how many there are, by reason."""
    if rejects.rows:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejects.rows)
        write_durably(
            dataset_writer.rejects_path(output, unit.number),
            lines.encode("utf-8", "backslashreplace"),
        )
    return dict(Counter(row["reason"] for row in rejects.rows))


class _Ceiling:
    """Ends a hopeless job early: too much was rejected among the first documents already."""

    LEAST = 1000  # documents, before a share means anything

    def __init__(self, fraction: float) -> None:
        self._fraction, self._documents, self._rejects = fraction, 0, Counter[str]()

    def __call__(self, result: dict[str, Any]) -> None:
        self._documents += sum(documents_in(result, split) for split in result["splits"])
        self._rejects.update(result["rejects"])
        if self._documents + self._rejects.total() >= self.LEAST:
            dataset_writer.check_rejected(self._documents, self._rejects, self._fraction)
