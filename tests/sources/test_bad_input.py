"""Every kind of bad input ends in the documented effect: a document, or a line of rejects.jsonl; never silence."""

import bz2
import gzip
import io
import json
import lzma
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.sources.documents import read_documents
from data_prep.sources.inputs import InputConfig, OnError, find_units
from data_prep.sources.rejects import REASONS, Rejects
from data_prep.tokens.tokenize_job import TokenizeConfig, main
from pipeline import cli
from pipeline.data.manifest import Manifest
from pipeline.errors import DataError
from tests.support.corpus import make_texts, make_tokenizer, write_jsonl

GOOD = b'{"text": "good"}\n'
LINES = GOOD * 1000  # compresses well, so that half of the compressed file holds many lines
NOISE = b"".join(b'{"text": "%032x"}\n' % (i**40 % 2**128) for i in range(5000))  # does not


def tar_of(members, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT, **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def parquet_of(**columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def table_of(kind, names, *columns):
    """Parquet or arrow, file or stream; names may come twice."""
    table, buffer = pa.table([pa.array(c) for c in columns], names=names), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, buffer)
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(
            buffer, table.schema
        ) as writer:
            writer.write_table(table, max_chunksize=2)
    return buffer.getvalue()


def damaged_header(tar, member):
    """The tar with one byte changed in the name of a member of 512 bytes or less."""
    content = bytearray(tar)
    content[1024 * member] ^= 1
    return bytes(content)


def tar_with_link():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("1.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
        link = tarfile.TarInfo("2.txt")
        link.type, link.linkname = tarfile.LNKTYPE, "1.txt"
        tar.addfile(link)
    return buffer.getvalue()


def not_utf8_column():
    values = pa.array([b"a", b"\xff", b"c"])
    return pa.Array.from_buffers(pa.string(), 3, values.buffers())


def views():
    """The same as string views, which polars and others write."""
    values = pa.array([b"a", b"\xff", b"c"]).cast(pa.binary_view())
    return pa.Array.from_buffers(pa.string_view(), 3, values.buffers())


TAR = tar_of([("1.txt", b"one"), ("2.txt", b"two"), ("3.txt", b"three")])
PARQUET = parquet_of(text=["a", "b"])
STREAM = table_of("stream", ["text"], ["a", "b", "c"])
APART = tar_of([("0.txt", b"a"), ("1.txt", b"b"), ("0.json", b'{"text": "a"}'), ("2.txt", b"c")])
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 12345\n" % 0
# name: (file name, content, texts that are read, reasons of what is not, further settings)
CASES = {
    # lines
    "broken line": ("a.jsonl", GOOD + b'{"text": \n' + GOOD, ["good", "good"], ["broken_json"], {}),
    "last line cut off": ("a.jsonl", GOOD + b'{"text": "goo', ["good"], ["broken_json"], {}),
    "trailing comma": ("a.jsonl", b'{"text": "x",}\n' + GOOD, ["good"], ["broken_json"], {}),
    "single quotes": ("a.jsonl", b"{'text': 'x'}\n" + GOOD, ["good"], ["broken_json"], {}),
    "two objects in a line": ("a.jsonl", b'{"text": "x"}{"text": "y"}\n' + GOOD, ["good"], ["broken_json"], {}),
    "a line of text": ("a.jsonl", b"hello\n" + GOOD, ["good"], ["broken_json"], {}),
    "utf-16": ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), [], ["invalid_utf8", "broken_json"], {}),
    "control character": ("a.jsonl", b'{"text": "a\x01b"}\n' + GOOD, ["good"], ["broken_json"], {}),
    "deep nesting": ("a.jsonl", b"[" * 100_000 + b"\n" + GOOD, ["good"], ["broken_json"], {"max_document_mb": 1}),
    "binary noise": ("a.jsonl", b"\x00\xff\xfe\x80\n" + GOOD, ["good"], ["invalid_utf8"], {}),
    "a list": ("a.jsonl", b'["text"]\n' + GOOD, ["good"], ["not_an_object"], {}),
    "a string": ("a.jsonl", b'"text"\n' + GOOD, ["good"], ["not_an_object"], {}),
    "a number": ("a.jsonl", b"7\n" + GOOD, ["good"], ["not_an_object"], {}),
    "null line": ("a.jsonl", b"null\n" + GOOD, ["good"], ["not_an_object"], {}),
    "no text field": ("a.jsonl", b'{"body": "x"}\n' + GOOD, ["good"], ["missing_field"], {}),
    "empty object": ("a.jsonl", b"{}\n" + GOOD, ["good"], ["missing_field"], {}),
    "nested field missing": ("a.jsonl", b'{"a": {"c": "x"}}\n', [], ["missing_field"], {"text_field": "a.b"}),
    "nested in a string": ("a.jsonl", b'{"a": "x"}\n', [], ["missing_field"], {"text_field": "a.b"}),
    "text is null": ("a.jsonl", b'{"text": null}\n' + GOOD, ["good"], ["not_a_string"], {}),
    "text is a number": ("a.jsonl", b'{"text": 1.5}\n' + GOOD, ["good"], ["not_a_string"], {}),
    "text is a list": ("a.jsonl", b'{"text": ["x"]}\n' + GOOD, ["good"], ["not_a_string"], {}),
    "text is an object": ("a.jsonl", b'{"text": {"x": 1}}\n' + GOOD, ["good"], ["not_a_string"], {}),
    "invalid utf-8": ("a.jsonl", b'{"text": "a\xffb"}\n' + GOOD, ["good"], ["invalid_utf8"], {}),
    "overlong utf-8": ("a.jsonl", b'{"text": "a\xc0\xafb"}\n' + GOOD, ["good"], ["invalid_utf8"], {}),
    "utf-8 of a surrogate": ("a.jsonl", b'{"text": "a\xed\xa0\x80b"}\n' + GOOD, ["good"], ["invalid_utf8"], {}),
    "latin-1": ("a.jsonl", b'{"text": "na\xefve"}\n' + GOOD, ["good"], ["invalid_utf8"], {}),
    "lone high surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n' + GOOD, ["good"], ["lone_surrogate"], {}),
    "lone low surrogate": ("a.jsonl", b'{"text": "a\\udc00b"}\n' + GOOD, ["good"], ["lone_surrogate"], {}),
    "escaped NUL": ("a.jsonl", b'{"text": "a\\u0000b"}\n' + GOOD, ["good"], ["nul"], {}),
    "empty text": ("a.jsonl", b'{"text": ""}\n' + GOOD, ["good"], ["empty"], {}),
    "too long a text": ("a.jsonl", b'{"text": "%s"}\n' % (b"x" * 1500) + GOOD, ["good"], ["too_large"], {}),
    "a line without end": ("a.jsonl", GOOD + b"x" * 20_000_000, ["good"], ["too_large"], {}),
    "the key twice": ("a.jsonl", b'{"text": "x", "text": "y"}\n' + GOOD, ["good"], ["ambiguous"], {}),
    "a key on the way twice": (
        "a.jsonl", b'{"a": {"b": "x"}, "a": {"b": "y"}}\n{"a": {"b": "z"}}\n', ["z"], ["ambiguous"], {"text_field": "a.b"},
    ),
    # json that may be lines
    "json lines": ("a.json", GOOD * 2, ["good", "good"], [], {}),
    "json lines, compressed": ("a.json.gz", gzip.compress(GOOD * 2), ["good", "good"], [], {}),
    "one array": ("a.json", b'[{"text": "x"}, {"text": "y"}]', [], ["not_json_lines"], {}),
    "one array over lines": ("a.json", b'[\n{"text": "x"},\n{"text": "y"}\n]\n', [], ["not_json_lines"], {}),
    "one object over lines": ("a.json.gz", gzip.compress(b'{\n "text": "x"\n}\n'), [], ["not_json_lines"], {}),
    "one array in many units": (
        "a.json", b"[\n" + b'{"text": "x"},\n' * 300 + b"]\n", [], ["not_json_lines"], {"unit_mb": 0.001},
    ),
    # lines that are odd, but good
    "surrogate pair": ("a.jsonl", b'{"text": "\\ud83d\\ude00"}\n', ["😀"], [], {}),
    "NaN in another field": ("a.jsonl", b'{"text": "x", "score": NaN}\n', ["x"], [], {}),
    "blank lines": ("a.jsonl", b"\n  \n" + GOOD + b"\r\n\n", ["good"], [], {}),
    "byte-order mark": ("a.jsonl", b"\xef\xbb\xbf" + GOOD, ["good"], [], {}),
    "Windows line ends": ("a.jsonl", b'{"text": "x"}\r\n{"text": "y"}\r\n', ["x", "y"], [], {}),
    "no last line end": ("a.jsonl", b'{"text": "x"}', ["x"], [], {}),
    "another key twice": ("a.jsonl", b'{"text": "x", "b": 1, "b": 2, "c": {"text": "text"}}\n', ["x"], [], {}),
    "a key with dots": ("a.jsonl", b'{"a.b": "x"}\n', ["x"], [], {"text_field": "a.b"}),
    # text files
    "latin-1 file": ("a.txt", b"na\xefve", [], ["invalid_utf8"], {}),
    "binary file": ("a.txt", b"\x7fELF\x00\x01", [], ["nul"], {}),
    "empty file": ("a.txt", b"", [], ["empty"], {}),
    "only a byte-order mark": ("a.txt", b"\xef\xbb\xbf", [], ["empty"], {}),
    "large file": ("a.txt", b"x" * 2000, [], ["too_large"], {}),
    # what a clone without Git LFS holds
    **{f"pointer{suffix}": ("a" + suffix, POINTER, [], ["damaged_file"], {})
       for suffix in (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet", ".tar")},
    "a text that tells of pointers": ("a.txt", b"A pointer: " + POINTER, ["A pointer: " + POINTER.decode()], [], {}),
    # compressed files
    "gzip cut off": ("a.jsonl.gz", gzip.compress(NOISE)[:-9000], None, ["damaged_file"], {}),
    "zstd cut off": ("a.jsonl.zst", zstandard.compress(NOISE)[:-9000], None, ["damaged_file"], {}),
    "bzip2 cut off": ("a.jsonl.bz2", bz2.compress(NOISE, 1)[:-9000], None, ["damaged_file"], {}),
    "xz cut off": ("a.jsonl.xz", lzma.compress(NOISE)[:-9000], None, ["damaged_file"], {}),
    "not gzip": ("a.jsonl.gz", GOOD, [], ["damaged_file"], {}),
    "not zstd": ("a.jsonl.zst", GOOD, [], ["damaged_file"], {}),
    "not bzip2": ("a.jsonl.bz2", GOOD, [], ["damaged_file"], {}),
    "not xz": ("a.jsonl.xz", GOOD, [], ["damaged_file"], {}),
    "gzip checksum wrong": (
        "a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-8] + bytes(8), [], ["damaged_file"], {},
    ),
    "empty gzip": ("a.txt.gz", gzip.compress(b""), [], ["empty"], {}),
    "two zstd frames": ("a.jsonl.zst", zstandard.compress(GOOD) * 2, ["good", "good"], [], {}),
    "two gzip members": ("a.jsonl.gz", gzip.compress(GOOD) * 2, ["good", "good"], [], {}),
    "two bzip2 streams": ("a.jsonl.bz2", bz2.compress(GOOD) * 2, ["good", "good"], [], {}),
    "two xz streams, padded": ("a.jsonl.xz", (lzma.compress(GOOD) + bytes(4)) * 2, ["good", "good"], [], {}),
    **{f"head of the second stream damaged{suffix}": (
        "a.jsonl" + suffix, pack(GOOD) + b"\0" * 4 + b"\1" + pack(GOOD)[1:], ["good"], ["damaged_file"], {},
    ) for suffix, pack in ((".bz2", bz2.compress), (".xz", lzma.compress))},
    **{f"end of the second stream missing{suffix}": (
        "a.jsonl" + suffix, pack(GOOD) + pack(GOOD)[:5], ["good"], ["damaged_file"], {},
    ) for suffix, pack in ((".bz2", bz2.compress), (".xz", lzma.compress))},
    **{f"nothing but zeros{suffix}": ("a.jsonl" + suffix, bytes(512), [], ["damaged_file"], {})
       for suffix in (".gz", ".zst", ".bz2", ".xz")},
    **{f"no byte{suffix}": ("a.jsonl" + suffix, b"", [], ["damaged_file"], {}) for suffix in (".bz2", ".xz")},
    # parquet
    "not parquet": ("a.parquet", b"PAR1 nonsense PAR1", [], ["damaged_file"], {}),
    "parquet cut off": ("a.parquet", PARQUET[:-20], [], ["damaged_file"], {}),
    "empty parquet file": ("a.parquet", b"", [], ["damaged_file"], {}),
    "no text column": ("a.parquet", parquet_of(body=["x"]), [], ["missing_field"], {}),
    "null rows": ("a.parquet", parquet_of(text=["x", None, "y"]), ["x", "y"], ["not_a_string"], {}),
    "rows of numbers": ("a.parquet", parquet_of(text=[1, 2]), [], ["not_a_string"] * 2, {}),
    "a row that is not utf-8": ("a.parquet", parquet_of(text=not_utf8_column()), ["a", "c"], ["invalid_utf8"], {}),
    "struct without the field": ("a.parquet", parquet_of(a=[{"c": "x"}]), [], ["missing_field"], {"text_field": "a.b"}),
    "the column twice": ("a.parquet", table_of("parquet", ["text", "text"], ["a"], ["b"]), [], ["ambiguous"], {}),
    # arrow
    "arrow stream": ("a.arrow", STREAM, ["a", "b", "c"], [], {}),
    "arrow file": ("a.arrow", table_of("file", ["text"], ["a", "b", "c"]), ["a", "b", "c"], [], {}),
    "arrow stream cut between batches": ("a.arrow", STREAM[:-8], [], ["damaged_file"], {}),
    "two arrow streams in a row": ("a.arrow", STREAM * 2, ["a", "b", "c"], ["damaged_file"], {}),
    "an arrow stream, then zeros": ("a.arrow", STREAM + bytes(8), [], ["damaged_file"], {}),
    "arrow string views": ("a.arrow", table_of("file", ["text"], views()), ["a", "c"], ["invalid_utf8"], {}),
    "arrow stream cut off": ("a.arrow", STREAM[:-50], [], ["damaged_file"], {}),
    "not arrow": ("a.arrow", b"x" * 2000, [], ["damaged_file"], {}),
    "the arrow column twice": ("a.arrow", table_of("stream", ["text", "text"], ["a"], ["b"]), [], ["ambiguous"], {}),
    "no arrow column": ("a.arrow", table_of("file", ["body"], ["a"]), [], ["missing_field"], {}),
    # tars
    "tar cut off": ("a.tar", TAR[: 5 * 512 + 1], ["one", "two"], ["damaged_file"], {}),
    "tar cut between members": ("a.tar", TAR[: 4 * 512], ["one"], ["damaged_file"], {}),  # two may have had more
    "damaged header": ("a.tar", damaged_header(TAR, 2), ["one"], ["damaged_file"], {}),
    "two tars in a row": ("a.tar", TAR + TAR, ["one", "two", "three"], ["damaged_file"], {}),
    "a sample in two places": ("a.tar", APART, ["a", "b", "c"], ["ambiguous"], {}),
    "a link": ("a.tar", tar_with_link(), ["x"], ["missing_field"], {}),
    "a large member": ("a.tar", tar_of([("1.txt", b"x" * 3000), ("2.txt", b"y")]), ["y"], ["too_large"], {}),
    "a name without extension": ("a.tar", tar_of([("1.txt", b"x"), ("2", b"y")]), ["x"], ["missing_field"], {}),
    "not a tar": ("a.tar", b"x" * 2000, [], ["damaged_file"], {}),
    "no text in the sample": ("a.tar", tar_of([("1.jpg", b"x"), ("2.txt", b"y")]), ["y"], ["missing_field"], {}),
    "broken json member": ("a.tar", tar_of([("1.json", b"{"), ("2.txt", b"y")]), ["y"], ["broken_json"], {}),
    "tar text not utf-8": ("a.tar", tar_of([("1.txt", b"\xff"), ("2.txt", b"y")]), ["y"], ["invalid_utf8"], {}),
    "a name twice": ("a.tar", tar_of([("1.txt", b"x"), ("1.txt", b"y"), ("2.txt", b"z")]), ["z"], ["ambiguous"], {}),
    "the key twice in a member": ("a.tar", tar_of([("1.json", b'{"text": "x", "text": "y"}')]), [], ["ambiguous"], {}),
}  # fmt: skip


def read(path, **settings):
    """(texts, rows of rejects.jsonl) of one file."""
    settings = {"on_error": OnError.quarantine, "max_document_mb": 0.001} | settings
    cfg = InputConfig(input=str(path), **settings)
    rejects = Rejects(cfg.on_error)
    return [
        d.text for unit in find_units(cfg) for d in read_documents(unit, cfg, rejects)
    ], rejects.rows


@pytest.mark.parametrize("case", CASES)
def test_quarantine_keeps_what_is_good_and_names_the_rest(tmp_path, case):
    name, content, texts, reasons, settings = CASES[case]
    (tmp_path / name).write_bytes(content)
    found, rejects = read(tmp_path / name, **settings)
    assert [row["reason"] for row in rejects] == reasons
    assert all(row["file"] == str(tmp_path / name) for row in rejects)
    if texts is None:  # cut off: the documents before the damage
        assert 0 < len(found) < 5000
        assert [json.loads(line)["text"] for line in NOISE.splitlines()[: len(found)]] == found
    else:
        assert found == texts


@pytest.mark.parametrize("case", CASES)
def test_fail_ends_at_the_first_bad_document_with_its_place(tmp_path, case):
    name, content, texts, reasons, settings = CASES[case]
    (tmp_path / name).write_bytes(content)
    bad = [reason for reason in reasons if reason != "empty"]
    if not bad:
        assert read(tmp_path / name, on_error=OnError.fail, **settings)[0] == texts
        return
    with pytest.raises(DataError, match=f"{name}.*{bad[0]}: .*on_error=quarantine"):
        read(tmp_path / name, on_error=OnError.fail, **settings)


def test_every_reason_is_tested():
    # `removed` is no fault of an input: tests/test_trace.py.
    assert {reason for *_, reasons, _ in CASES.values() for reason in reasons} == set(REASONS) - {
        "removed"
    }


def test_a_reject_tells_where_it_is(tmp_path):
    lines = [b'{"text": "one"}\n', b"\n", b'{"text": "\xff"}\n', b'{"text": "two"}\n', b"{\n"]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    _, rejects = read(tmp_path / "a.jsonl")
    assert [(row["line"], row["offset"]) for row in rejects] == [(3, 17), (5, 47)]
    (tmp_path / "a.parquet").write_bytes(parquet_of(text=["x", None]))
    _, rejects = read(tmp_path / "a.parquet")
    assert [row["row"] for row in rejects] == [1]
    (tmp_path / "a.tar").write_bytes(tar_of([("7.jpg", b"x")]))
    _, rejects = read(tmp_path / "a.tar")
    assert [row["member"] for row in rejects] == ["7"]


def test_a_file_that_changes_during_the_job_is_not_used(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    cfg = InputConfig(input=str(path))
    (unit,) = find_units(cfg)
    write_jsonl(path, ["x", "y"])
    with pytest.raises(DataError, match="has 26 bytes; it had 13 when the job was planned"):
        list(read_documents(unit, cfg, Rejects(OnError.quarantine)))
    path.unlink()
    with pytest.raises(DataError, match="cannot be opened: there is no such file"):
        list(read_documents(unit, cfg, Rejects(OnError.quarantine)))


@pytest.fixture
def job(tmp_path):
    make_tokenizer(tmp_path / "tokenizer.json")
    write_jsonl(tmp_path / "a.jsonl", [*make_texts(40), ""])
    (tmp_path / "a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes() + b"{\n")
    words = [
        f"input={tmp_path}/a.jsonl",
        f"output={tmp_path}/out",
        f"tokenizer={tmp_path}/tokenizer.json",
        "workers=1",
    ]
    return lambda *more: main(cli.compose(TokenizeConfig, [*words, *more], config="tokenize"))


def test_rejects_stand_beside_the_datasets(job, tmp_path):
    job("on_error=quarantine", "max_rejected_fraction=0.03")
    rows = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [(row["reason"], row["line"]) for row in rows] == [("empty", 41), ("broken_json", 42)]
    assert json.loads((tmp_path / "out/summary.json").read_text())["rejects"] == {
        "broken_json": 1,
        "empty": 1,
    }
    assert (
        sum(Manifest.load(tmp_path / "out" / split).documents for split in ("train", "validation"))
        == 40
    )


def test_too_many_rejects_end_the_job_and_a_higher_ceiling_goes_on(job, tmp_path):
    with pytest.raises(
        DataError, match="1 of 41 documents were rejected.*max_rejected_fraction=0.01"
    ):
        job("on_error=quarantine")
    assert not (tmp_path / "out/train").exists()
    job("on_error=quarantine", "max_rejected_fraction=0.05")
    assert (tmp_path / "out/train/manifest.json").exists()


def test_after_a_failure_quarantine_may_go_on_in_the_same_folder(job, tmp_path):
    with pytest.raises(DataError, match="line 42, offset"):
        job()
    assert not (tmp_path / "out/train").exists()
    job("on_error=quarantine", "max_rejected_fraction=0.05")
    assert (tmp_path / "out/train/manifest.json").exists()


def test_an_input_of_empty_documents_only_is_an_error(tmp_path):
    make_tokenizer(tmp_path / "tokenizer.json")
    path = write_jsonl(tmp_path / "a.jsonl", ["", ""])
    words = [
        f"input={path}",
        f"output={tmp_path}/out",
        f"tokenizer={tmp_path}/tokenizer.json",
        "workers=1",
    ]
    with pytest.raises(DataError, match="the input has no documents .*'empty': 2"):
        main(cli.compose(TokenizeConfig, words, config="tokenize"))
