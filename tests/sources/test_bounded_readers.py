"""No input makes a worker take more memory than max_document_mb allows, and lack of memory drops no document."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_prep.sources import documents, lines, pieces, rejects
from data_prep.sources.dialogues import TalkConfig, read_talks
from data_prep.sources.documents import read_documents
from data_prep.sources.inputs import InputConfig, OnError, find_units
from data_prep.sources.lines import structure_bytes
from data_prep.sources.rejects import Rejects
from pipeline.errors import DataError, MachineError
from tests.support.arrow import views, write_arrow

GOOD = b'{"text": "good"}\n'


# 2 GB of addresses, libraries included, as docs/data.md says; of each file its documents and reasons.
READ = """
import collections, json, os, resource, sys
from data_prep.sources.documents import read_documents
from data_prep.sources.inputs import InputConfig, OnError, find_units
from data_prep.sources.rejects import Rejects
import pyarrow.parquet, isal.igzip, zstandard
resource.setrlimit(resource.RLIMIT_AS, (2 * 10**9, 2 * 10**9))
folder = sys.argv[1]
cfg = InputConfig(input=f"{folder}/*", max_document_mb=45)
found = {name: [0, []] for name in os.listdir(folder)}
for unit in find_units(cfg):
    rejects = Rejects(OnError.quarantine)
    for document in read_documents(unit, cfg, rejects):
        (name,) = [name for name in found if f"/{name}" in document.id]
        found[name][0] += 1
    for row in rejects.rows:
        reasons = found[os.path.basename(row["file"])][1]
        reasons += [row["reason"]] if row["reason"] not in reasons else []
print(json.dumps(found))
"""


def parquet(path: Path, values: list[bytes], **options: object) -> None:
    """One row group; values that are the same object take their memory once."""
    tables = {id(value): pa.table({"text": pa.array([value], pa.binary())}) for value in values}
    table = pa.concat_tables([tables[id(value)] for value in values])
    pq.write_table(table, path, row_group_size=len(values), **options)


@pytest.mark.slow
def test_a_worker_stays_within_2_gb_whatever_it_reads(tmp_path):
    """Without its bound each of these files takes more, and the machine with it."""
    endless = tmp_path / "endless.jsonl"
    with endless.open("wb") as file:
        file.write(GOOD)
        file.truncate(2_100_000_000)  # a line of zeros, which takes no space on the disk
    nothing = bytes(1 << 20)
    with gzip.open(tmp_path / "gzip.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(GOOD)
        for _ in range(300):
            file.write(nothing)
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    blocks = [compressor.compress(GOOD), *(compressor.compress(nothing) for _ in range(2100))]
    (tmp_path / "bomb.jsonl.zst").write_bytes(b"".join([*blocks, compressor.flush()]))
    dense = b'{"a": [' + b"[]," * 25_000_000 + b"[]]}\n"
    (tmp_path / "dense.jsonl").write_bytes(dense + GOOD)
    info = tarfile.TarInfo("1.txt")
    info.size = 2_100_000_000
    with (tmp_path / "member.tar").open("wb") as file:
        file.write(info.tobuf())
        file.truncate(info.size + 2048)
    info.type, info.size = tarfile.XHDTYPE, 2_100_000_000
    (tmp_path / "header.tar").write_bytes(info.tobuf() + bytes(1 << 20))
    large = [b"a" * 50_000_000] * 40
    parquet(tmp_path / "rows.parquet", large, use_dictionary=False)
    parquet(
        tmp_path / "uneven.parquet",
        [*[b"b"] * 9960, *large],
        use_dictionary=False,
        compression="zstd",
    )
    parquet(
        tmp_path / "shared.parquet", [b"a" * 40_000_000] * 50, dictionary_pagesize_limit=1 << 30
    )
    value = b"a" * 7_000_000  # 256 of them: 1.8 GB
    rows = pa.array([0] * 256, pa.int32())
    shared = pa.DictionaryArray.from_arrays(rows, pa.array([value], pa.string()))
    write_arrow(tmp_path / "dictionary.arrow", shared, 2)
    write_arrow(tmp_path / "views.arrow", views(value, 256), 2)
    lists = pa.ListArray.from_arrays(pa.array([0, 256], pa.int32()), shared)
    pq.write_table(pa.table({"text": lists}), tmp_path / "lists.parquet")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {
        "bomb.jsonl.zst": [1, ["damaged_file"]],
        "dense.jsonl": [1, ["too_large"]],
        "dictionary.arrow": [512, []],
        "endless.jsonl": [1, ["too_large"]],
        "gzip.jsonl.gz": [1, ["too_large"]],
        "header.tar": [0, ["damaged_file"]],
        "lists.parquet": [0, ["not_a_string"]],
        "member.tar": [0, ["too_large"]],
        "rows.parquet": [0, ["too_large"]],
        "shared.parquet": [50, []],
        "uneven.parquet": [9960, ["too_large"]],
        "views.arrow": [512, []],
    }


@pytest.mark.parametrize(
    "error",
    [MemoryError(), pa.ArrowMemoryError("x"), zstandard.ZstdError("Allocation error : not enough memory")],
    ids=str,
)  # fmt: skip
def test_lack_of_memory_is_no_damage(tmp_path, monkeypatch, error):
    """The file is good: dropped, it would be missing without a word; the job ends and can go on."""
    (tmp_path / "a.jsonl").write_bytes(GOOD)

    def read(*_: object):
        raise error
        yield

    monkeypatch.setitem(documents.READERS, documents.Format.jsonl, read)
    cfg = InputConfig(input=str(tmp_path / "a.jsonl"))
    found = Rejects(OnError.quarantine)
    with pytest.raises(MachineError, match="a.jsonl: out of memory"):
        list(read_documents(find_units(cfg)[0], cfg, found))
    assert not found.rows


def test_of_a_sample_only_the_file_that_is_used_is_read(tmp_path):
    """A huge json beside a text is no reason to drop the text, nor to read it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, size in [("1.json", 5000), ("1.txt", 4), ("1.md", 5000), ("2.json", 5000)]:
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(b"x" * size))
    (tmp_path / "a.tar").write_bytes(stream.getvalue())
    cfg = InputConfig(input=str(tmp_path / "a.tar"), max_document_mb=0.002)
    found = Rejects(OnError.quarantine)
    assert [d.text for d in read_documents(find_units(cfg)[0], cfg, found)] == ["xxxx"]
    assert [(row["member"], row["reason"]) for row in found.rows] == [("2", "too_large")]


def test_a_unit_of_nothing_but_rejects_ends_the_job(tmp_path, monkeypatch):
    """Each is kept until the unit is done: a file of 10^9 bad lines would take 400 GB."""
    monkeypatch.setattr(rejects, "MOST_REJECTS", 5)
    (tmp_path / "a.jsonl").write_bytes(b"x\n" * 6)
    cfg = InputConfig(input=str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="more than 5 documents .* broken_json"):
        list(read_documents(find_units(cfg)[0], cfg, Rejects(OnError.quarantine)))


def test_a_file_of_empty_streams_is_not_copied_for_each():
    """Each of 14 bytes was given 64 KiB, of which it copied what was not its own."""
    fed = 0

    class Stream:
        def __init__(self) -> None:
            self._stream = bz2.BZ2Decompressor()

        def __getattr__(self, name: str) -> object:
            return getattr(self._stream, name)

        def decompress(self, data: bytes, most: int) -> bytes:
            nonlocal fed
            fed += len(data)
            return self._stream.decompress(data, most)

    stored = (bz2.compress(b"") * 3 + bytes(1000)) * 500 + bz2.compress(GOOD * 9000) * 3
    assert pieces._Streams(io.BytesIO(stored), Stream).read() == GOOD * 27_000
    assert fed < 50 * len(stored)


def test_a_text_that_compresses_well_is_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "FREE_BYTES", 0)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD * 200_000))
    cfg = InputConfig(input=str(tmp_path / "a.jsonl.gz"))
    units = find_units(cfg)
    assert len(list(read_documents(units[0], cfg, Rejects(OnError.fail)))) == 200_000


@pytest.mark.parametrize(
    ("line", "size"),
    [
        (b'{"a": "xx"}', 6),
        (rb'{"a": "x\"[[\\"}', 6),
        (b"[[],[]]", 7),
        (b'[1, "abc', 4),
        (b"", 0),
    ],
)
def test_the_structure_of_a_line_is_what_is_outside_its_strings(line, size):
    """Counted by hand, a closing quote with it; escaped quotes end no string, and `\\\\` before a quote does not escape it."""
    assert structure_bytes(line) == size


@given(st.lists(st.sampled_from([b'"', b"\\", b"[", b"xx"])), st.integers(1, 5))
def test_the_structure_of_a_line_does_not_depend_on_how_it_is_cut(parts, block_bytes):
    """A long line is looked at in blocks; an escape may lie on an edge."""
    line = b"".join(parts)
    whole = structure_bytes(line)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", block_bytes)
        assert structure_bytes(bytearray(line)) == whole


def test_a_line_of_many_values_is_too_large(tmp_path, monkeypatch):
    """Each `[],` may be a list of 60 bytes; commas and brackets of the text are text."""
    monkeypatch.setattr(lines, "MOST_STRUCTURE_BYTES", 80)
    rows = [{"text": "many", "a": [[]] * 30}, {"text": "[,],{" * 100}, {"text": "few", "a": 1}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg, found = InputConfig(input=str(tmp_path / "a.jsonl")), Rejects(OnError.quarantine)
    read = [d.text for d in read_documents(find_units(cfg)[0], cfg, found)]
    assert read == [row["text"] for row in rows[1:]]
    assert [(r["line"], r["reason"]) for r in found.rows] == [(1, "too_large")]


def test_a_piece_within_a_huge_line_is_not_read_beyond_its_end():
    """A line of 1 GB lies in many pieces: read to its end by each, it took the square of its size."""
    file, found = io.BytesIO(b"x" * 1000 + b"\n[]\n"), Rejects(OnError.fail)
    for start, stop in [(1, 100), (100, 999), (999, 1000), (999, 1001)]:
        piece = pieces.Piece("a.jsonl", 1004, start, stop)
        assert not list(lines.read_lines(file, piece, InputConfig(), found)) and file.tell() == stop
    for start, stop in [(1001, 1004), (1001, 1002), (999, 1002), (500, 1003)]:
        piece = pieces.Piece("a.jsonl", 1004, start, stop)
        assert list(lines.read_lines(file, piece, InputConfig(), found)) == [(1001, None, b"[]")]


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_of_many_blocks_is_read_as_it_is(tmp_path, monkeypatch, end):
    """It grows where it is, and stops at the limit; the next line begins behind it."""
    monkeypatch.setattr(lines, "BLOCK_BYTES", 7)
    texts = ["a" * 100, "ü" * 50, "b" * 11]
    content = b"\n".join(json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts)
    (tmp_path / "a.jsonl").write_bytes(content + end)
    cfg = InputConfig(input=str(tmp_path / "a.jsonl"))
    found = Rejects(OnError.quarantine)
    read = [d.text for d in read_documents(find_units(cfg)[0], cfg, found)]
    assert read == texts and not found.rows
    cfg = InputConfig(input=str(tmp_path / "a.jsonl"), max_document_mb=6e-5)
    read = [d.text for d in read_documents(find_units(cfg)[0], cfg, found)]
    assert read == texts[1:]
    assert [(r["reason"], r["line"], r["detail"]) for r in found.rows] == [
        ("too_large", 1, "100 characters")
    ]


def test_a_saved_dataset_names_its_own_files_only(tmp_path: Path):
    for name in ("/etc/passwd", "../x.arrow", ".."):
        folder = tmp_path / "saved"
        folder.mkdir(exist_ok=True)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        (folder / "dataset_info.json").write_text("{}")
        with pytest.raises(DataError, match="is no file of its folder"):
            find_units(InputConfig(input=str(folder)))


def test_a_dialogue_of_a_table_is_no_larger_than_a_document(tmp_path):
    """A row was read whole, whatever its size: only lines were bounded."""
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]}
        for text in ("a" * 9000, "a")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    cfg = TalkConfig(input=str(tmp_path / "a.parquet"), max_document_mb=0.002)
    found = Rejects(OnError.quarantine)
    (talk,) = read_talks(find_units(cfg)[0], cfg, found)
    assert talk.messages == rows[1]["messages"]
    assert [(row["row"], row["reason"]) for row in found.rows] == [(0, "too_large")]


def test_a_line_is_let_go_when_its_text_is_handed_on(tmp_path: Path) -> None:
    """Beside a document of 1 GB there lay the line it was read from, until it was on the disk."""
    size = 8_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a b " * (size // 4)}) + "\n")
    cfg = InputConfig(input=str(tmp_path / "a.jsonl"))
    unit = find_units(cfg)[0]  # the line begins in the first piece
    documents = read_documents(unit, cfg, Rejects(OnError.fail))
    tracemalloc.start()
    try:
        document = next(documents)  # kept: what an ended generator held is free
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(document.text) == size and held < 1.5 * size
