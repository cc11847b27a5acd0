"""All units of a tokenize job are done: parts become the shards of datasets.

    python -m data_prep.finalize OUT

tokenize.py does this by itself when the last unit is done. Parts are renamed, in the order of the
units; neighbours that are small (validation splits, small inputs) are joined. manifest.json comes
last. Everything here may be killed and run again: what has been renamed is recognised by the plan,
which follows from the markers
    alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from data_prep.jobs import close_job
from data_prep.tokens.dataset_writer import finalize, is_complete
from pipeline import cli, log
from pipeline.log import logger


@dataclass
class FinalizeConfig:
    """Settings of data_prep.finalize."""

    output: str = MISSING
    """Folder of the job."""
    max_rejected_fraction: float = 0.01
    """A larger share of rejected documents is an error (empty ones do not count)."""


def main(cfg: FinalizeConfig) -> None:
    """Finish a job whose units are all done.

    Raises:
        DataError: no job there, units are missing, nothing was read, or too much was rejected.
    """
    log.setup()
    output = Path(cfg.output)
    if is_complete(output):
        close_job(output)
        logger.info(f"{output} is complete already")
        return
    finalize(output, max_rejected_fraction=cfg.max_rejected_fraction)


if __name__ == "__main__":
    cli.run(main, FinalizeConfig, config="finalize", positional=["output"])
