"""Is this dataset whole? Every byte is read and compared with what the manifest and the index say.

    python -m data_prep.verify DATASET              all of it, at the speed of the disk
    python -m data_prep.verify DATASET quick=true   sizes, index and tokenizer only: seconds

    manifest.json, index.npy, tokenizer.json -> checksums, totals
    each tar -> sha256; each member -> headers, padding, crc32; tokens < vocab_size; a document
                starts after each EOD

DATASET is a folder or an address that fsspec understands; OUT of data_prep/tokenize.py stands for
OUT/train and OUT/validation. Exit code 0: whole; 1: not, and each fault is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from data_prep.tokens.check import find_faults
from pipeline import cli
from pipeline.data.manifest import Manifest
from pipeline.redaction import redact


@dataclass
class VerifyConfig:
    """Settings of data_prep.verify."""

    dataset: str = MISSING
    """Folder or address of the dataset."""
    quick: bool = False
    """Compare sizes, index and tokenizer only; do not read the shards."""
    workers: int | None = None
    """Processes; null: one a CPU core."""
    max_faults: int = 100
    """Stop listing after so many faults."""


def main(cfg: VerifyConfig) -> int:
    """Print each fault, then one line of summary for each dataset; 1 if there was a fault.

    Raises:
        DataError: there is no dataset.
    """
    num_faults = 0
    for folder in datasets_in(cfg.dataset):
        found = 0
        for fault in find_faults(folder, quick=cfg.quick, workers=cfg.workers):
            found += 1
            if num_faults + found <= cfg.max_faults:
                print(redact(f"fault: {fault}"))
        num_faults += found
        result = f"{found} faults" if found else _summary(folder, quick=cfg.quick)
        print(redact(f"{folder}: {result}"))
    return 1 if num_faults else 0


def datasets_in(folder: str) -> list[str]:
    """The folder itself if it is a dataset, else the datasets `train` and `validation` in it."""
    folder = folder.rstrip("/")
    splits = [f"{folder}/{split}" for split in ("train", "validation")]
    if "://" in folder or not Path(folder).is_dir() or Path(folder, "manifest.json").exists():
        return [folder]
    return [split for split in splits if Path(split).is_dir()] or [folder]


def _summary(folder: str, *, quick: bool) -> str:
    manifest = Manifest.load(folder)
    return (
        f"{'sizes and index fit' if quick else 'whole'}: {manifest.tokens:,} tokens, "
        f"{manifest.documents:,} documents, {manifest.num_shards:,} shards, "
        f"{int(manifest.shard_bytes.sum()) / 1e6:,.1f} MB"
    )


if __name__ == "__main__":
    cli.run(main, VerifyConfig, config="verify", positional=["dataset"])
