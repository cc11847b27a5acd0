"""The record of a checkpoint without its tensors, for what is decided before any is read."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoint import folder as folders
from pipeline.files import sha256_of


def write_record(folder: Path, text: str) -> None:
    """checkpoint.json, and the list of its checksum and the tokenizer's, where there is one."""
    sums = {folders.RECORD: sha256_of(text.encode()), folders.INDEX: "0" * 64}
    if (tokenizer := folder / folders.TOKENIZER).exists():
        sums[tokenizer.name] = sha256_of(tokenizer)
    (folder / folders.RECORD).write_text(text)
    (folder / folders.SUMS).write_text(folders.sums_text(sums))
