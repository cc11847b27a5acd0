"""Hostile token files and tokenizers: every use ends well or in a PipelineError; no traceback, hang, code or file elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.tokens.import_job import _open, find_token_units
from pipeline.data.shard_format import TokenizerIdentity
from pipeline.data.tokenizer import Tokenizer
from tests.support.corpus import make_tokenizer
from tests.support.hostile import Damage, all_of, every, of_file, of_json, try_all, with_content


def use_token_files(folder: Path) -> None:
    _open.cache_clear()
    identity = TokenizerIdentity("0" * 64, 400, 0)

    def use(path: Path) -> None:
        find_token_units(str(path), column="ids", tokenizer=identity)
        file = _open(str(path), "ids", identity)
        for begin, end in file.ranges():
            for ids in file.read(begin, end):
                ids.sum()

    files = [path for path in sorted(folder.iterdir()) if path.suffix != ".idx"]
    all_of(*(partial(use, path) for path in files))


def test_token_files(tmp_path, outside):
    import pyarrow as pa
    import pyarrow.parquet as pq

    valid = tmp_path / "valid"
    valid.mkdir()
    (valid / "nano.bin").write_bytes(np.array([5, 6, 0, 7, 0], "<u2").tobytes())
    (valid / "mega.bin").write_bytes(np.array([5, 6, 0, 7, 0], "<u2").tobytes())
    index = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x08"
    index += np.array([2, 3], "<u8").tobytes() + np.array([3, 2], "<i4").tobytes()
    index += np.array([0, 6], "<i8").tobytes() + np.array([0, 1, 2], "<i8").tobytes()
    (valid / "mega.idx").write_bytes(index)
    table = pa.table({"ids": [[5, 6, 0], [7, 0]]})
    pq.write_table(table, valid / "d.parquet")
    with pa.ipc.new_file(str(valid / "e.arrow"), table.schema) as file:
        file.write_table(table)

    def cases() -> Iterator[tuple[str, str, Damage]]:
        yield from every(sorted(os.listdir(valid)), of_file(outside))
        for place in range(9, len(index)):
            for value in (0, 0x7F, 0xFF):
                changed = index[:place] + bytes([value]) + index[place + 1 :]
                yield "mega.idx", f"byte {place} is {value}", (
                    with_content(changed)
                )  # fmt: skip

    try_all(valid, use_token_files, cases(), least=200)


def use_tokenizer(folder: Path) -> None:
    for eod in (None, 0, "<|endoftext|>"):
        tokenizer = Tokenizer.from_file(folder, eod=eod)
        tokenizer.decode(tokenizer.encode("a quick <|endoftext|> fox"))
        _ = (
            tokenizer.special_ids,
            tokenizer.ids_sha256,
            tokenizer.token_bytes,
            tokenizer.has_exact_bytes,
        )


def test_tokenizers(tmp_path, outside):
    valid = tmp_path / "valid"
    path = make_tokenizer(valid / "tokenizer.json", vocab_size=300)
    content = json.loads(path.read_text())

    def cases() -> Iterator[tuple[str, str, Damage]]:
        yield from every(["tokenizer.json"], of_file(outside))
        for name, damage in of_json(content, depth=3):
            if "vocab." not in name or "vocab.!" in name:  # one word stands for all
                yield "tokenizer.json", name, damage

    try_all(valid, use_tokenizer, cases(), least=200)
