"""No input makes a worker take more memory than max_document_mb allows, and lack of memory drops no document."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_prep.sources import documents, lines, pieces, rejects
from data_prep.sources.documents import read_documents
from data_prep.sources.inputs import InputConfig, OnError, find_units
from data_prep.sources.lines import structure_bytes
from data_prep.sources.rejects import Rejects
from pipeline.errors import DataError, MachineError

GOOD = b'{"text": "good"}\n'


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
