"""Other projects' token files become the datasets that tokenizing their text gives."""

import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.import_tokens import ImportConfig, main
from data_prep.sources import token_files
from data_prep.tokens import check
from data_prep.tokens.browse import read_document
from pipeline import cli
from pipeline.data.manifest import Manifest
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError, DataError
from tests.support.corpus import make_texts, make_tokenizer

TEXTS = make_texts(80)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(make_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer.json"))


@pytest.fixture(scope="module")
def documents(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text) for text in TEXTS]


def megatron(path: Path, sequences: list[list[int]], bounds: list[int], *, code: int = 8) -> Path:
    """A .bin and .idx by the layout of Megatron-LM's indexed_dataset.py."""
    dtype = np.dtype(token_files.MEGATRON_DTYPES[code])
    lengths = [len(s) for s in sequences]
    pointers = np.concatenate(([0], np.cumsum(lengths)[:-1])) * dtype.itemsize
    path.write_bytes(np.concatenate(sequences).astype(dtype).tobytes())
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
        + np.array(lengths, "<i4").tobytes() + pointers.astype("<i8").tobytes() + np.array(bounds, "<i8").tobytes()
    )  # fmt: skip
    return path


def run(output: Path, source: Path | str, tokenizer: Tokenizer, *changes: str) -> None:
    words = [
        f"input={source}",
        f"output={output}",
        f"tokenizer={tokenizer.path}",
        "workers=1",
        "validation_fraction=0",
    ]
    main(cli.compose(ImportConfig, [*words, *changes], config="import_tokens"))


def texts_of(output: Path, tokenizer: Tokenizer, split: str = "train") -> list[str]:
    assert list(check.find_faults(str(output / split), workers=1)) == []
    manifest = Manifest.load(output / split)
    return [tokenizer.decode(read_document(manifest, n)[:-1]) for n in range(manifest.documents)]


def written(output: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(output)): p.read_bytes()
        for p in output.rglob("*")
        if p.is_file() and p.name != "job.json"
    }


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "RANGE_TOKENS", 700)
    monkeypatch.setattr(token_files, "RANGE_BYTES", 3000)


@pytest.mark.parametrize("with_eod", [True, False])
@pytest.mark.parametrize("code", [4, 8])
def test_megatron(
    tmp_path: Path,
    tokenizer: Tokenizer,
    documents: list,
    with_eod: bool,
    code: int,
    small_ranges: None,
) -> None:
    ended = [d + [tokenizer.eod] * with_eod for d in documents]
    path = megatron(tmp_path / "a_text_document.bin", ended, list(range(len(ended) + 1)), code=code)
    assert len(token_files.MegatronTokens(path).ranges()) > 3
    run(tmp_path / "out", path, tokenizer)
    assert texts_of(tmp_path / "out", tokenizer) == TEXTS


def test_megatron_documents_of_several_sequences(
    tmp_path: Path, tokenizer: Tokenizer, documents: list
) -> None:
    """With --split-sentences, a document is several sequences of the index."""
    halves = [part for d in documents for part in (d[: len(d) // 2], d[len(d) // 2 :])]
    path = megatron(tmp_path / "a.bin", halves, list(range(0, len(halves) + 1, 2)))
    run(tmp_path / "out", path, tokenizer)
    assert texts_of(tmp_path / "out", tokenizer) == TEXTS


def test_nanogpt(tmp_path: Path, tokenizer: Tokenizer, documents: list, small_ranges: None) -> None:
    stream = np.array([i for d in documents for i in [*d, tokenizer.eod]], "<u2")
    stream.tofile(tmp_path / "train.bin")
    assert len(token_files.FlatTokens(tmp_path / "train.bin", eod=0, vocab_size=400).ranges()) > 3
    run(tmp_path / "out", tmp_path / "train.bin", tokenizer)
    assert texts_of(tmp_path / "out", tokenizer) == TEXTS


def test_llm_c(tmp_path: Path, tokenizer: Tokenizer, documents: list, small_ranges: None) -> None:
    """A header of 256 int32, and the end mark in front of each document."""
    stream = np.array([i for d in documents for i in [tokenizer.eod, *d]], "<u2")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(stream)
    (tmp_path / "a.bin").write_bytes(header.tobytes() + stream.tobytes())
    run(tmp_path / "out", tmp_path / "a.bin", tokenizer)
    assert texts_of(tmp_path / "out", tokenizer) == TEXTS


@pytest.mark.parametrize("size", range(1, 14))
def test_every_document_is_in_one_range_only(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges that end before, on and after an end mark."""
    monkeypatch.setattr(token_files, "RANGE_TOKENS", size)
    stream = [5, 6, 0, 7, 0, 8, 9, 10, 11, 12, 0, 13]
    np.array(stream, "<u2").tofile(tmp_path / "a.bin")
    file = token_files.FlatTokens(tmp_path / "a.bin", eod=0, vocab_size=400)
    found = [ids.tolist() for begin, end in file.ranges() for ids in file.read(begin, end)]
    assert found == [[5, 6], [7], [8, 9, 10, 11, 12], [13]]


@pytest.mark.parametrize("kind", ["parquet", "file.arrow", "stream.arrow"])
def test_columns(
    tmp_path: Path, tokenizer: Tokenizer, documents: list, kind: str, small_ranges: None
) -> None:
    table = pa.table(
        {"n": list(range(len(documents))), "ids": pa.array(documents, pa.list_(pa.int32()))}
    )
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=7)
    else:
        new = pa.ipc.new_file if kind == "file.arrow" else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    assert len(token_files.ColumnTokens(path, column="ids").ranges()) > 2
    run(tmp_path / "out", path, tokenizer, "column=ids")
    assert texts_of(tmp_path / "out", tokenizer) == TEXTS


def test_bytes_do_not_depend_on_workers_or_tasks(
    tmp_path: Path, tokenizer: Tokenizer, documents: list, small_ranges: None
) -> None:
    np.array([i for d in documents for i in [*d, 0]], "<u2").tofile(tmp_path / "a.bin")
    for name, *changes in (("one",), ("two", "workers=2")):
        run(tmp_path / name, tmp_path / "a.bin", tokenizer, "validation_fraction=0.2", *changes)
    for task in (2, 0, 1):
        words = ("validation_fraction=0.2", f"task={task}", "num_tasks=3")
        run(tmp_path / "three", tmp_path / "a.bin", tokenizer, *words)
    assert written(tmp_path / "one") == written(tmp_path / "two") == written(tmp_path / "three")
    both = [texts_of(tmp_path / "one", tokenizer, split) for split in ("train", "validation")]
    assert sorted(both[0] + both[1]) == sorted(TEXTS)
    assert 5 <= len(both[1]) <= 30


def test_sources_and_bytes_of_text(tmp_path: Path, tokenizer: Tokenizer, documents: list) -> None:
    for name, part in (("a", documents[:30]), ("b", documents[30:])):
        np.array([i for d in part for i in [*d, 0]], "<u2").tofile(tmp_path / f"{name}.bin")
    run(tmp_path / "out", f"web={tmp_path}/a.bin,code={tmp_path}/b.bin", tokenizer)
    manifest = Manifest.load(tmp_path / "out" / "train")
    assert manifest.sources == ["web", "code"]
    assert manifest.text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_a_document_is_cut_at_an_inner_end_mark_and_empty_ones_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = megatron(tmp_path / "a.bin", [[5, 0, 6, 0], [0], [7]], [0, 1, 2, 3])
    run(tmp_path / "out", path, tokenizer)
    manifest = Manifest.load(tmp_path / "out" / "train")
    assert [read_document(manifest, n).tolist() for n in range(manifest.documents)] == [
        [5, 0],
        [6, 0],
        [7, 0],
    ]
    assert '"empty": 1' in (tmp_path / "out" / "summary.json").read_text()


def damaged(path: Path, kind: str) -> Path:
    megatron(path, [[5, 0], [6, 0]], [0, 1, 2])
    index = path.with_suffix(".idx")
    raw = index.read_bytes()
    if kind == "magic":
        index.write_bytes(b"TNTIDX" + raw[6:])
    elif kind == "version":
        index.write_bytes(raw[:9] + b"\x02" + raw[10:])
    elif kind == "short index":
        index.write_bytes(raw[:-9])
    elif kind == "short tokens":
        path.write_bytes(path.read_bytes()[:-2])
    elif kind == "order":
        index.write_bytes(raw[:42] + raw[50:58] + raw[42:50] + raw[58:])
    elif kind == "long index":
        index.write_bytes(raw + bytes(2))
    elif kind == "bounds stop early":
        megatron(path, [[5, 0], [6, 0], [7, 0]], [0, 1, 2])
    elif kind == "bounds begin late":
        megatron(path, [[5, 0], [6, 0]], [1, 2])
    elif kind == "bounds go back":
        megatron(path, [[5, 0], [6, 0]], [0, 2, 1, 2])
    elif kind == "bounds beyond":
        megatron(path, [[5, 0], [6, 0]], [0, 1, 3])
    elif kind == "no bounds":
        megatron(path, [[5, 0], [6, 0]], [])
    elif kind == "long tokens":
        path.write_bytes(path.read_bytes() + bytes(2))
    elif kind == "llm.c count":
        index.unlink()
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, 3
        path.write_bytes(header.tobytes() + np.array([0, 5, 0, 6], "<u2").tobytes())
    elif kind == "odd bytes":
        index.unlink()
        path.write_bytes(path.read_bytes() + b"x")
    elif kind == "large id":
        megatron(path, [[5, 60000], [6, 0]], [0, 1, 2])
    elif kind == "negative id":
        megatron(path, [[5, -1], [6, 0]], [0, 1, 2], code=4)
    return path


@pytest.mark.parametrize(
    "kind, message",
    [
        ("magic", "not a Megatron index"),
        ("version", "version 2"),
        ("short index", "truncated"),
        ("short tokens", "announces 8"),
        ("order", "one after the other"),
        ("long index", "longer than"),
        (
            "bounds stop early",
            r"the sequences \[0\] to \[2\], but the file has the sequences 0 to 3",
        ),
        ("bounds begin late", r"the sequences \[1\] to"),
        ("bounds go back", "do not follow"),
        ("bounds beyond", r"to \[3\], but the file has the sequences 0 to 2"),
        ("no bounds", "would belong to no document"),
        ("long tokens", "announces 8"),
        ("llm.c count", "announces 3 ids"),
        ("odd bytes", "no whole number"),
        ("large id", "the id 60000; the tokenizer has the ids 0 to 407"),
        ("negative id", "the id -1"),
    ],
)
def test_damaged_files_are_named(
    tmp_path: Path, tokenizer: Tokenizer, kind: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        run(tmp_path / "out", damaged(tmp_path / "a.bin", kind), tokenizer)
    assert "a.bin" in str(caught.value) or "a.idx" in str(caught.value)


@pytest.mark.parametrize(
    "column, values, message",
    [
        ("ids", [[1, 2], None], "nulls"),
        ("ids", ["text"], "not a list of integers"),
        ("tokens", [[1]], "no column 'ids'; it has tokens"),
    ],
)
def test_columns_that_hold_no_ids_are_named(
    tmp_path: Path, tokenizer: Tokenizer, column: str, values: list, message: str
) -> None:
    pq.write_table(pa.table({column: values}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        run(tmp_path / "out", tmp_path / "a.parquet", tokenizer, "column=ids")


def test_a_column_of_ids_that_is_there_twice_is_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    table = pa.table([pa.array([[1, 2]]), pa.array([[3, 4]])], names=["ids", "ids"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="2 columns 'ids'"):
        run(tmp_path / "out", tmp_path / "a.parquet", tokenizer, "column=ids")


def test_an_arrow_stream_that_was_cut_between_batches_is_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """pyarrow takes it for a short one."""
    table = pa.table({"ids": [[1, 2], [3, 4]]})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(content[:-8])
    with pytest.raises(DataError, match="no end mark"):
        run(tmp_path / "out", tmp_path / "a.arrow", tokenizer, "column=ids")


def test_ids_without_a_header_are_refused_where_two_bytes_do_not_hold_them(tmp_path: Path) -> None:
    """uint32 read as uint16: twice as many ids, all of them legal."""
    np.array([70000, 5, 0], "<u4").tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match="the tokenizer has 100000 ids"):
        token_files.FlatTokens(tmp_path / "a.bin", eod=0, vocab_size=100000)


@pytest.mark.parametrize("dtype", ["<u4", "<i8"])
def test_wide_ids_without_a_header_are_not_read_as_uint16(
    tmp_path: Path, tokenizer: Tokenizer, dtype: str
) -> None:
    """Every other id would be 0, and legal: the ids of a small tokenizer leave the upper bytes empty."""
    np.array([5, 6, 7, 0] * 10, dtype).tofile(tmp_path / "a.bin")
    with pytest.raises(
        DataError, match=f"of every {np.dtype(dtype).itemsize} bytes only the first"
    ):
        run(tmp_path / "out", tmp_path / "a.bin", tokenizer)
    np.array([5, 0] * 10 + [6, 7], "<u2").tofile(tmp_path / "b.bin")  # documents of one token
    run(tmp_path / "out", tmp_path / "b.bin", tokenizer)


def test_two_arrow_streams_in_a_row_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """pyarrow reads the first one."""
    table = pa.table({"ids": [[1, 2], [3, 4]]})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(content * 2)
    with pytest.raises(DataError, match="data follows the end of the arrow stream"):
        run(tmp_path / "out", tmp_path / "a.arrow", tokenizer, "column=ids")


def test_suffixes_in_capitals_are_known(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pq.write_table(pa.table({"ids": [[1, 2], [3, 4]]}), tmp_path / "A.PARQUET")
    run(tmp_path / "out", tmp_path / "A.PARQUET", tokenizer, "column=ids")
    np.array([5, 6, 0], "<u2").tofile(tmp_path / "A.BIN")
    run(tmp_path / "flat", tmp_path / "A.BIN", tokenizer)


def test_other_kinds_of_files_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match="end in .bin"):
        run(tmp_path / "out", tmp_path / "a.txt", tokenizer)
