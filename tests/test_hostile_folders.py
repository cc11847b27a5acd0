"""Folders of strangers, generated: every use ends well or in a PipelineError; never in a traceback, a hang, code, or a
file elsewhere.

    a small valid folder --damage to a file, to a field--> hundreds of others --the functions that commands call-->
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.tokens import browse
from data_prep.tokens.check import find_faults
from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.data import shard_format as fmt
from pipeline.data.datasets import describe, open_datasets
from pipeline.data.manifest import Manifest
from pipeline.data.reader import Reader
from pipeline.errors import PipelineError
from tests.support.corpus import make_tokenizer
from tests.support.hostile import Damage, fault_of, of_file, of_json, pickle_of, snapshot
from tests.support.token_dataset import write_dataset


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A file of somebody's; all around it must stay as it is."""
    folder = tmp_path / "outside"
    folder.mkdir()
    file = folder / "precious.json"
    file.write_text('{"secret": 1}')
    before = snapshot(folder)
    yield file
    assert snapshot(folder) == before, "something was written, or run, outside of the folder"


def try_all(
    kind: str, valid: Path, use: Callable[[Path], Any], cases: Iterator[tuple[str, str, Damage]]
) -> None:
    """Use a copy of the valid folder after each (file, name, damage); all that goes wrong is told."""
    parent = valid.parent / "tried"
    assert fault_of(use, shutil.copytree(valid, parent / "valid")) is None
    use(parent / "valid")
    shutil.rmtree(parent)
    faults, number = {}, 0
    for file, name, damage in cases:
        folder = shutil.copytree(valid, parent / "copy")
        damage(folder / file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if fault := fault_of(use, folder):
                faults[f"{file}: {name}"] = fault
        written = {path.name for path in parent.iterdir()} - {"copy"}
        assert not written, f"{file}: {name}: written beside the folder: {written}"
        shutil.rmtree(parent)
        number += 1
    assert faults == {}, f"{len(faults)} of {number} cases of {kind}"
    assert number >= 200, number


def every(files: list[str], damages: dict[str, Damage]) -> Iterator[tuple[str, str, Damage]]:
    for file in files:
        for name, damage in damages.items():
            yield file, name, damage


# ---- datasets ------------------------------------------------------------------------------------


def use_dataset(folder: Path) -> None:
    """What train, verify and show do with a dataset; each in spite of the others."""
    problems = []
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

    for part in (read, lambda: list(find_faults(str(folder), workers=1)), show):
        try:
            part()
        except PipelineError as error:
            problems.append(error)
    if problems:
        raise problems[0]


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
        yield "index.npy", "objects", lambda path: void_write(path, code)

    try_all("datasets", valid, use_dataset, cases())


def void_write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
