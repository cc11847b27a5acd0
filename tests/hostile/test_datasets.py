"""Hostile datasets: every use ends well or in a PipelineError; no traceback, hang, code or file elsewhere."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.tokens import browse
from data_prep.tokens.check import find_faults
from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.data import shard_format as fmt
from pipeline.data.datasets import describe, open_datasets
from pipeline.data.manifest import Manifest
from pipeline.data.reader import Reader
from tests.support.corpus import make_tokenizer
from tests.support.hostile import Damage, all_of, every, of_file, of_json, pickle_of, try_all, void
from tests.support.token_dataset import write_dataset


def use_dataset(folder: Path) -> None:
    """What train, verify and show do with a dataset."""
    cfg = DataConfig(train=[DatasetConfig(path=str(folder))])

    def read() -> None:
        describe(cfg)
        datasets = open_datasets(cfg.train, cfg=cfg, cache_dir=folder)
        zero = np.zeros(3, np.int64)
        Reader(datasets, seq_len=16).gather(zero, zero, np.arange(3), documents=True)

    def show() -> None:
        manifest = Manifest.load(folder)
        browse.document_lengths(manifest)
        browse.read_document(manifest, 1)
        list(browse.search(manifest, "fox"))

    all_of(read, lambda: list(find_faults(str(folder), workers=1)), show)


def write_manifest(path: Path, content: Any) -> None:
    if isinstance(content, dict) and "checksum" in content:
        content = content | {"checksum": fmt.UNSEALED}
    text = json.dumps(content).encode()
    seals = text.count(f'"checksum": "{fmt.UNSEALED}"'.encode()) == 1
    path.write_bytes(fmt.seal(text) if seals else text)


def write_index(field: str, value: int) -> Damage:
    """The index with another number in its first row, and the manifest that its author would seal."""

    def damage(path: Path) -> None:
        index = np.load(path)
        index[field][0] = value
        np.save(path, index)
        content = json.loads((path.parent / "manifest.json").read_text())
        content["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        write_manifest(path.parent / "manifest.json", content)

    return damage


def dataset(folder: Path) -> Path:
    tokenizer = make_tokenizer(folder / "made.json").read_bytes()
    tokens = np.arange(150) % 300
    tokens[[40, 100, 149]] = 0
    write_dataset(
        folder, [tokens], starts=[np.array([0, 41, 101])], vocab_size=400, tokenizer=tokenizer
    )
    (folder / "made.json").unlink()
    return folder


def test_datasets(tmp_path, outside):
    valid = dataset(tmp_path / "valid")
    content = json.loads((valid / "manifest.json").read_text())

    def cases() -> Iterator[tuple[str, str, Damage]]:
        files = ["manifest.json", "index.npy", "tokenizer.json", fmt.shard_path(0)]
        yield from every(files, of_file(outside))
        for name, damage in of_json(content, write=write_manifest):
            yield "manifest.json", name, damage
        for field in fmt.INDEX_DTYPE.names or ():
            for value in (0, 1, 77, 2**31, int(np.iinfo(fmt.INDEX_DTYPE[field]).max)):
                yield "index.npy", f"{field} is {value}", write_index(field, value)
        objects = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            objects, {"descr": "|O", "fortran_order": False, "shape": (3,)}
        )
        code = objects.getvalue() + pickle_of(outside.with_name("code-was-run"))
        yield "index.npy", "objects", lambda path: void(path.write_bytes(code))

    try_all(valid, use_dataset, cases(), least=200)
