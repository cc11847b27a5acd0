"""data_prep.sources: what is found, how it is cut into units, and what is read from each format."""

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.sources.documents import read_documents
from data_prep.sources.inputs import InputConfig, OnError, find_files, find_units
from data_prep.sources.kinds import Format
from data_prep.sources.rejects import Document, Rejects
from pipeline.errors import ConfigError, DataError
from tests.support.arrow import save_dataset
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


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset leaves files open
def test_samples_are_those_of_webdataset(tmp_path):
    """Names with folders, several dots, capitals and notes are split as webdataset splits them."""
    import webdataset

    names = ["a/1.txt", "a/1.seg.json", "b.c/2.TXT", "b.c/2.jpg", "3.json", "3.md", "__notes__"]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
    source = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    expected = [sample["__key__"] for sample in source]
    found = [d.id.removeprefix(f"{tmp_path}/a.tar/") for d in read(tmp_path / "a.tar")]
    assert found == expected == ["a/1", "b.c/2", "3"]


UNKNOWN = "csv tsv csv.gz xml pdf docx bin npz npy pkl pt safetensors zip 7z rar png jpeg mp4 db xlsx gz lz4".split()


@pytest.mark.parametrize("suffix", [*UNKNOWN, "", "parquet.gz"])
def test_what_is_of_no_known_kind_is_never_read_as_text(tmp_path, suffix):
    """A table or a picture would end up in the model as one long document."""
    path = tmp_path / (f"data.{suffix}" if suffix else "data")
    path.write_bytes(b"a,b\n1,2\n")
    write_jsonl(tmp_path / "good.jsonl", ["x"])
    for source in (path, f"{tmp_path}/good.jsonl,{path}", f"{tmp_path}/*"):
        with pytest.raises(ConfigError, match=f"{path} is of no kind .*format=text"):
            find_units(InputConfig(input=str(source)))
    assert [d.text for d in read(tmp_path)] == ["x"]  # passed over in a folder, and said
    if not suffix.endswith("gz"):
        assert [d.text for d in read(path, format=Format.text)] == ["a,b\n1,2\n"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_pointer_of_git_lfs_is_told_how_to_be_fetched(tmp_path, name):
    """A clone without LFS gave datasets of `oid sha256:`, a document a file."""
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")  # fmt: skip
    with pytest.raises(DataError, match=f"{name}: damaged_file.*`git lfs pull`"):
        read(tmp_path / name)


def test_files_that_a_folder_passes_over_are_counted(tmp_path, caplog):
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    for name in ("b.csv", "c.csv", "d.png"):
        (tmp_path / name).write_bytes(b"x")
    with caplog.at_level("INFO", logger="pretrain"):
        read(tmp_path)
    assert "passed over, being of no kind that is read: .csv (2), .png (1)" in caplog.text


def test_links_to_folders_are_passed_over_and_counted(tmp_path, caplog):
    """A corpus laid out with links was left out without a word."""
    write_jsonl(tmp_path / "in" / "a.jsonl", ["x"])
    write_jsonl(tmp_path / "out" / "b.jsonl", ["y"])
    for name in ("one", "two"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "out")
    with caplog.at_level("INFO", logger="pretrain"):
        assert [d.text for d in read(tmp_path / "in")] == ["x"]
    assert "in: passed over, links to folders: 2" in caplog.text


def test_a_saved_hugging_face_dataset_is_read_as_one(tmp_path):
    texts = make_texts(10)
    folder = save_dataset(tmp_path / "saved", {"text": texts})
    assert [d.text for d in read(folder)] == texts
    assert [d.text for d in read(tmp_path)] == texts


def test_saved_datasets_that_are_not_one_table_are_refused(tmp_path):
    save_dataset(tmp_path / "all" / "train", {"text": ["x", "y"]})
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match="the splits train, test .*input=.*/all/train"):
        read(tmp_path / "all")
    folder = save_dataset(
        tmp_path / "chosen", {"text": ["x", "y"]}, _indices_data_files=[{"filename": "i"}]
    )
    with pytest.raises(ConfigError, match="flatten_indices"):
        read(folder)
    gone = save_dataset(tmp_path / "gone", {"text": ["x", "y"]})
    (gone / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match="data-00001-of-00002.arrow is missing"):
        read(gone)


ODD = [
    "a,b",
    "a b",
    "a[1]",
    "a=b",
    "web=x",
    "[ab]",
    "a?",
    "a*",
    "größe 数学",
    "a'b\"",
    "a#b@c",
    "${x}",
    "a,b=c[1], d",
]


@pytest.mark.parametrize("name", ODD)
def test_paths_are_literal(tmp_path, monkeypatch, name):
    """What exists is never a pattern, a list or a label."""
    write_jsonl(tmp_path / name / "c.jsonl", ["x"])
    write_jsonl(tmp_path / "ab" / "c.jsonl", ["wrong"])
    write_jsonl(tmp_path / f"{name}.jsonl", ["y"])
    monkeypatch.chdir(tmp_path)
    for source in (
        f"{tmp_path}/{name}",
        f"{tmp_path}/{name}/*.jsonl",
        name,
        f"{name}/c.jsonl",
        f"{name}/*",
    ):
        assert [d.text for d in read(source)] == ["x"], source
    assert [d.text for d in read(f"{name}.jsonl,other={tmp_path}/{name}")] == ["y", "x"]
    labels = [label for label, _ in find_files(InputConfig(input=f"{name},web={tmp_path}/{name}"))]
    assert labels == [name, "web"]


def test_names_that_are_no_utf8_have_ids_that_are(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.jsonl"
    with open(path, "wb") as file:
        file.write(jsonl(["x"]))
    (document,) = read(tmp_path)
    assert document.id == f"{tmp_path}/\\xff.jsonl@0"


def test_tars_are_read_without_importing_torch(tmp_path):
    """1.5 s and 200 MB in every worker."""
    (tmp_path / "a.tar").write_bytes(tar(["x"], "txt"))
    code = (
        "import sys; from tests.sources.test_documents import read\n"
        f"assert [d.text for d in read({str(tmp_path / 'a.tar')!r})] == ['x']\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
