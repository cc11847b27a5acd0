"""Token files of other projects become our datasets, without tokenizing again.

    python -m data_prep.import_tokens input=my_text_document.bin output=OUT tokenizer=tokenizer.json
    python -m data_prep.import_tokens input='web=a/*.parquet' output=OUT tokenizer=T.json column=ids

    .bin with .idx      Megatron-LM (MMIDIDX, version 1)
    .bin                nanoGPT (uint16) or llm.c (its header); documents end, or begin, with
                        end-of-document
    .parquet, .arrow    a column with a list of ids in each row, one row a document

The tokenizer is the one that made the ids; an id that it does not have ends the job. A document
that holds the end-of-document id inside is cut there, and empty ones are left out and counted. The
result is that of tokenize.py: OUT/train, OUT/validation, the same bytes for any number of workers
and tasks, and a killed job goes on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from omegaconf import MISSING

from data_prep.jobs import JobConfig, close_job, open_job, run_units
from data_prep.tokens import dataset_writer
from data_prep.tokens.import_job import find_token_units, import_unit
from data_prep.tokens.split import check_fraction
from pipeline import cli, log
from pipeline.data.shard_format import VERSION, TokenizerIdentity
from pipeline.data.tokenizer import Tokenizer
from pipeline.log import logger


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


def main(cfg: ImportConfig) -> None:
    """Do this task's share; the task that finds all units done makes the datasets.

    Raises:
        PipelineError: a file is damaged or not of a known kind, or the ids do not belong to the
            tokenizer.
    """
    log.setup()
    check_fraction(cfg.validation_fraction)
    output = Path(cfg.output)
    tokenizer = Tokenizer.from_file(cfg.tokenizer, eod=cfg.eod)
    identity = TokenizerIdentity(tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod)
    units, num_files, digest = find_token_units(cfg.input, column=cfg.column, tokenizer=identity)
    facts = {
        "job": "import_tokens",
        "version": VERSION,
        "input": cfg.input,
        "files": num_files,
        "units": len(units),
        "inputs_sha256": digest,
        "tokenizer": asdict(identity),
        "column": cfg.column,
        "validation_fraction": cfg.validation_fraction,
    }
    open_job(output, facts)
    if dataset_writer.is_complete(output):
        close_job(output)
        logger.info(f"{output} is complete already")
        return
    dataset_writer.copy_tokenizer(output, tokenizer)
    lengths = [tokenizer.token_byte_lengths(at_start=first) for first in (True, False)]
    run = partial(
        import_unit,
        output=output,
        column=cfg.column,
        tokenizer=identity,
        token_byte_lengths=np.stack(lengths),
        validation_fraction=cfg.validation_fraction,
    )
    if run_units(dataset_writer.markers(output), units, run, job=cfg, label="import"):
        dataset_writer.finalize(output, max_rejected_fraction=0)
    else:
        logger.info(
            f"this task is done; the last one, or python -m data_prep.finalize {output}, ends the "
            "job"
        )


if __name__ == "__main__":
    cli.run(main, ImportConfig, config="import_tokens", positional=["input", "output"])
