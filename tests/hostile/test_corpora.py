"""Hostile corpora: every use ends well or in a PipelineError; no traceback, hang, code or file elsewhere."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.sources.documents import read_documents
from data_prep.sources.inputs import InputConfig, OnError, find_units
from data_prep.sources.records import read_records
from data_prep.sources.rejects import Rejects
from tests.support.corpus import make_texts, write_jsonl
from tests.support.hostile import Damage, all_of, every, of_file, of_json, try_all, with_content


def use_corpus(folder: Path) -> None:
    """All documents and all records of a folder of files."""
    cfg, rejects = InputConfig(input=str(folder)), Rejects(OnError.quarantine)
    uses: list[Callable[[], Any]] = []
    for unit in find_units(cfg):
        uses.append(partial(exhaust, read_documents, unit, cfg, rejects))
        uses += [partial(exhaust, read_records, piece) for piece in unit.pieces]
    all_of(*uses)


def exhaust(read: Callable[..., Iterator[Any]], *arguments: Any) -> None:
    for _ in read(*arguments):
        pass


def tar_of(*members: tuple[tarfile.TarInfo, bytes], **options: Any) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def header(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("x.txt")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(*records: tuple[str, str]) -> bytes:
    lines = b""
    for key, value in records:
        text = f" {key}={value}\n".encode()
        size = len(text) + len(str(len(text) + 3))
        lines += f"{size}".encode() + text
    return lines


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def bad_tars(outside: Path) -> Iterator[tuple[str, bytes]]:
    good = tar_of((tarfile.TarInfo("1.txt"), b"good"))
    for kind, word in [
        (tarfile.XHDTYPE, "pax"),
        (tarfile.XGLTYPE, "globals"),
        (b"L", "name"),
        (b"K", "link"),
    ]:
        for size in (2**40, 2**33, -1):
            yield f"{word} of {size} bytes", header(kind, size) + good
        yield f"{word} cut", header(kind, 5000) + b"x" * 400
        yield f"{word} again and again", padded(header(kind, 512) + b"9" * 512) * 3000 + good
        yield f"{word} of nonsense", header(kind, 512) + b"\xff=\0" * 100 + bytes(212) + good
        for key, value in [("size", "-1"), ("size", "9" * 5000), ("path", "../" * 3000), ("mtime", "nan"),
                           ("GNU.sparse.map", "1,2,x"), ("GNU.sparse.size", "x"), ("hdrcharset", "nope")]:  # fmt: skip
            lines = pax((key, value))
            yield f"{word}: {key}={value[:9]}", header(kind, len(lines)) + padded(lines) + good
    for name in (
        "/etc/passwd.txt",
        "../../x.txt",
        "a\0b.txt",
        "",
        ".",
        "\udcff.txt",
        "x" * 4000 + ".txt",
    ):
        yield f"called {name[:20]!r}", tar_of((tarfile.TarInfo(name), b"text"))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S", b"?"):
        info = tarfile.TarInfo("1.txt")
        info.type, info.linkname = kind, str(outside)
        yield f"type {kind!r}", info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    yield "a huge file", header(tarfile.REGTYPE, 2**50) + b"x" * 512


def corpus(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    texts = make_texts(6)
    write_jsonl(folder / "a.jsonl", texts)
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress((folder / "a.jsonl").read_bytes()))
    (folder / "c.tar").write_bytes(
        tar_of(
            *(
                (tarfile.TarInfo(f"{i}.json"), json.dumps({"text": t}).encode())
                for i, t in enumerate(texts)
            )
        )
    )
    pq.write_table(pa.table({"text": texts}), folder / "d.parquet")
    with pa.ipc.new_stream(str(folder / "e.arrow"), pa.schema({"text": pa.string()})) as stream:
        stream.write_table(pa.table({"text": texts}))
    saved = folder / "f"
    saved.mkdir()
    shutil.copy(folder / "e.arrow", saved / "data.arrow")
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    (saved / "dataset_info.json").write_text("{}")
    return folder


def test_corpora(tmp_path, outside):
    valid = corpus(tmp_path / "valid")
    names = ["a.jsonl", "b.jsonl.zst", "c.tar", "d.parquet", "e.arrow", "f/state.json"]
    damages = of_file(outside)
    del damages["numbers"]  # a line of digits is a text like others

    def cases() -> Iterator[tuple[str, str, Damage]]:
        yield from every(names, damages)
        for name, content in bad_tars(outside):
            yield "c.tar", name, with_content(content)
        for name, damage in of_json({"_data_files": [{"filename": "data.arrow"}]}):
            yield "f/state.json", name, damage
        for strange in ("/etc/passwd", "../a.jsonl", "", "..", "a\0b"):
            content = json.dumps({"_data_files": [{"filename": strange}]}).encode()
            yield (
                "f/state.json",
                repr(strange),
                with_content(content),
            )

    try_all(valid, use_corpus, cases(), least=200)
