"""data_prep.inputs and documents: what is found, how it is cut into units, and what is read from each format."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.sources.documents import Document, Rejects, read_documents
from data_prep.sources.inputs import Format, InputConfig, OnError, find_files, find_units
from pipeline.errors import ConfigError
from tests.support.corpus import TEXTS, make_texts, write_jsonl

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def read(path, **settings):
    cfg = InputConfig(input=str(path), **settings)
    return [d for unit in find_units(cfg) for d in read_documents(unit, cfg, Rejects(OnError.fail))]


def jsonl(texts):
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def tar(texts, suffix):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for i, text in enumerate(texts):
            content = text.encode() if suffix == "txt" else json.dumps({"text": text}).encode()
            for name, data in ((f"{i:04d}.{suffix}", content), (f"{i:04d}.jpg", b"\xff")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet(texts, **options):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "text", "tar of text", "tar of json"])
def test_each_format_is_read_plain_and_compressed(tmp_path, kind, suffix):
    texts = TEXTS[:1] if kind == "text" else TEXTS
    content = {"jsonl": jsonl, "text": lambda t: t[0].encode(), "tar of text": lambda t: tar(t, "txt"),
               "tar of json": lambda t: tar(t, "json")}[kind](texts)  # fmt: skip
    path = tmp_path / f"a.{ {'jsonl': 'jsonl', 'text': 'md'}.get(kind, 'tar') }{suffix}"
    path.write_bytes(COMPRESS[suffix](content))
    assert [d.text for d in read(path)] == texts


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
def test_parquet_is_read_with_each_of_its_compressions(tmp_path, compression):
    texts = make_texts(600)
    (tmp_path / "a.parquet").write_bytes(
        parquet(texts, compression=compression, row_group_size=100)
    )
    assert [d.text for d in read(tmp_path / "a.parquet")] == texts


def test_parquet_large_strings_dictionaries_and_structs_are_read(tmp_path):
    columns = {
        "large": pa.array(TEXTS, pa.large_string()),
        "dictionary": pa.array(TEXTS).dictionary_encode(),
        "struct": pa.array([{"inner": text} for text in TEXTS]),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    for field in ("large", "dictionary", "struct.inner"):
        assert [d.text for d in read(tmp_path / "a.parquet", text_field=field)] == TEXTS


def test_documents_have_an_id_that_finds_them_a_label_and_their_url(tmp_path):
    path = tmp_path / "crawl" / "a.jsonl"
    path.parent.mkdir()
    path.write_bytes(b'{"text": "one", "url": "http://a"}\n{"text": "two"}\n')
    assert read(f"{tmp_path}/crawl/*.jsonl") == [
        Document("one", f"{path}@0", "crawl", "http://a"),
        Document("two", f"{path}@35", "crawl", ""),
    ]
    (tmp_path / "b.parquet").write_bytes(parquet(["x", "y"]))
    assert [d.id for d in read(tmp_path / "b.parquet")] == [
        f"{tmp_path}/b.parquet#0",
        f"{tmp_path}/b.parquet#1",
    ]
    (tmp_path / "c.tar").write_bytes(tar(["x"], "txt"))
    assert [d.id for d in read(tmp_path / "c.tar")] == [f"{tmp_path}/c.tar/0000"]


def test_labels_are_given_or_taken_from_the_path(tmp_path):
    write_jsonl(tmp_path / "web" / "a.jsonl", ["x"])
    write_jsonl(tmp_path / "b.jsonl", ["y"])
    found = find_files(
        InputConfig(input=f"{tmp_path}/web,books={tmp_path}/b.jsonl,{tmp_path}/b.jsonl")
    )
    assert [label for label, _ in found] == ["web", "books", "b"]


def test_fields_are_found_with_dots(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": {"b": {"c": "x"}}}\n')
    assert [d.text for d in read(tmp_path / "a.jsonl", text_field="a.b.c")] == ["x"]


@pytest.fixture
def folder(tmp_path):
    found = ["b/2.py", "b/1.md", "a.txt", "a.jsonl", "x.bin", "e.txt.gz"]
    for name in [*found, ".hidden.txt", "__pycache__/c.py", ".git/d.txt"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(b"x") if name.endswith("gz") else jsonl(["x"]))
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["a.jsonl", "a.txt", "b/1.md", "b/2.py", "e.txt.gz"]),
        ({"include": ".py,md"}, ["b/1.md", "b/2.py"]),
        ({"include": ".bin"}, ["x.bin"]),
        ({"include": ".txt"}, ["a.txt", "e.txt.gz"]),
        ({"exclude": "*/b/*,*.gz"}, ["a.jsonl", "a.txt"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else str(value),
)
def test_folders_give_known_kinds_of_files_in_order(folder, settings, names):
    found = find_files(InputConfig(input=str(folder), **settings))
    assert [str(Path(piece.path).relative_to(folder)) for _, piece in found] == names


def test_a_format_may_be_forced(folder):
    assert [d.text for d in read(folder / "a.jsonl", format=Format.text)] == ['{"text": "x"}\n']
    assert [d.text for d in read(folder / "a.txt", format=Format.jsonl)] == ["x"]


@pytest.mark.parametrize("unit_bytes", [1, 10, 37, 100, 1000, 100_000])
def test_byte_ranges_give_each_line_once_wherever_they_are_cut(tmp_path, unit_bytes):
    texts = make_texts(60)
    write_jsonl(tmp_path / "a.jsonl", texts)
    cfg = InputConfig(input=str(tmp_path / "a.jsonl"), unit_mb=unit_bytes / 1e6)
    units = find_units(cfg)
    assert len(units) >= (tmp_path / "a.jsonl").stat().st_size // unit_bytes // 2
    assert [d.text for d in read(tmp_path / "a.jsonl", unit_mb=unit_bytes / 1e6)] == texts


def test_small_files_share_a_unit_and_labels_do_not(tmp_path):
    for i in range(10):
        write_jsonl(tmp_path / "web" / f"{i}.jsonl", ["x" * 100])
    write_jsonl(tmp_path / "code" / "a.jsonl", ["y"])
    units = find_units(InputConfig(input=f"{tmp_path}/web,{tmp_path}/code", unit_mb=0.0005))
    assert [(unit.source, len(unit.pieces)) for unit in units] == [
        ("web", 4),
        ("web", 4),
        ("web", 2),
        ("code", 1),
    ]
    assert [unit.number for unit in units] == [0, 1, 2, 3]


def test_compressed_files_are_not_cut(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(make_texts(60))))
    (unit,) = find_units(InputConfig(input=str(tmp_path / "a.jsonl.gz"), unit_mb=0.0001))
    assert (unit.pieces[0].start, unit.pieces[0].stop) == (0, None)


def test_unit_size_must_be_positive(folder):
    with pytest.raises(ConfigError, match="unit_mb .-1.* must be above 0"):
        find_units(InputConfig(input=str(folder), unit_mb=-1))


def test_tars_are_read_with_webdataset_without_importing_torch(tmp_path):
    """webdataset imports torch where it finds it: 1.5 s and 200 MB in every worker."""
    (tmp_path / "a.tar").write_bytes(tar(["x"], "txt"))
    code = (
        "import sys; from tests.sources.test_documents import read\n"
        f"assert [d.text for d in read({str(tmp_path / 'a.tar')!r})] == ['x']\n"
        "assert 'webdataset' in sys.modules and 'torch' not in sys.modules\n"
        "import torch\n"  # and it can still be imported
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
