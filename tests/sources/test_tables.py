"""Tables: what their rows take, and arrow arrays whose places are wrong."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.sources import documents, tables
from data_prep.sources.dialogues import TalkConfig, read_talks
from data_prep.sources.documents import read_documents
from data_prep.sources.inputs import InputConfig, OnError, find_units
from data_prep.sources.records import read_records
from data_prep.sources.rejects import Rejects
from data_prep.sources.tables import row_bytes, slices
from pipeline.errors import DataError
from tests.support.arrow import views

SHARED = pa.array(["a" * 1000] * 64).dictionary_encode()
SHARING = [
    SHARED,
    views(b"a" * 1000, 64),
    pa.StructArray.from_arrays([SHARED], ["x"]),
    pa.ListArray.from_arrays(pa.array(range(65), pa.int32()), SHARED),
    pa.FixedSizeListArray.from_arrays(SHARED, 1),
    pa.ListViewArray.from_arrays([0] * 64, [1000] * 64, pa.array([b"a"] * 1000)),
    pa.RunEndEncodedArray.from_arrays(pa.array([64], pa.int32()), pa.array(["a" * 1000])),
    pa.UnionArray.from_dense(pa.array([0] * 64, pa.int8()), pa.array([0] * 64, pa.int32()), [pa.array(["a" * 1000])]),
    pa.array([[("k" * 500, "v" * 500)]] * 64, pa.map_(pa.string(), pa.string())),
    pa.array(["a" * 1000] * 64),
]  # fmt: skip


@pytest.mark.parametrize("array", SHARING, ids=lambda array: str(array.type)[:15])
def test_values_that_rows_share_count_in_each(monkeypatch, array):
    """256 rows of a dictionary's one value of 7 MB passed as 7 MB, and became 1.8 GB."""
    monkeypatch.setattr(tables, "BYTES_PER_BATCH", 5500)
    batch = pa.record_batch([array.slice(3, 60)], ["text"])
    assert row_bytes(batch).tolist() == [1000] * 60
    parts = list(slices(batch))
    assert [part.num_rows for part in parts] == [5] * 12
    assert [row for part in parts for row in part.to_pylist()] == batch.to_pylist()


@pytest.mark.parametrize(
    ("array", "size"),
    [(pa.array([1, None], pa.int16()), 2), (pa.nulls(2), 1), (pa.array([True, None]), 1)],
    ids=str,
)
def test_values_without_text_have_a_size(array, size):
    """Other columns of a table of evaluations."""
    assert row_bytes(pa.record_batch([array], ["x"])).tolist() == [size] * 2


def test_rows_of_a_column_with_a_dot_in_its_name_are_bounded(tmp_path, monkeypatch):
    """Its path is also that of a field `text` of a struct `my`."""
    monkeypatch.setattr(tables, "BYTES_PER_BATCH", 5500)
    table = pa.table({"my.text": ["a" * 1000] * 20, "mine": ["b" * 9000] * 20})
    pq.write_table(table, tmp_path / "a.parquet")
    with (tmp_path / "a.parquet").open("rb") as file:
        names, batches = tables.open_table(documents.Format.parquet, file)
        assert {batch.num_rows for batch in batches(["my.text"])} == {5}
    cfg = InputConfig(input=str(tmp_path / "a.parquet"), text_field="my.text")
    assert len(list(read_documents(find_units(cfg)[0], cfg, Rejects(OnError.fail)))) == 20


def test_lists_that_share_a_large_value_are_measured_before_they_are_decoded(tmp_path):
    """A row of 5 KB on the disk whose list named one value of 100 KB 2,400 times became 240 MB, and could be any size."""
    words = pa.DictionaryArray.from_arrays(pa.array([0] * 2400 + [1], pa.int32()), pa.array(["a" * 100_000, "b"]))  # fmt: skip
    lists = pa.ListArray.from_arrays(pa.array([0, 2400, 2401], pa.int32()), words)
    one = pa.StructArray.from_arrays([pa.array(["user"] * 2401), words], ["role", "content"])
    talks = pa.ListArray.from_arrays(pa.array([0, 2400, 2401], pa.int32()), one)
    pq.write_table(pa.table({"text": lists, "messages": talks}), path := tmp_path / "a.parquet")
    assert path.stat().st_size < 30_000
    with path.open("rb") as file:
        _, batches = tables.open_table(documents.Format.parquet, file)
        sizes = [
            (pa.total_allocated_bytes(), row_bytes(batch).tolist()) for batch in batches(["text"])
        ]
    assert [row for _, rows in sizes for row in rows] == [240_000_000, 1]
    assert max(taken for taken, _ in sizes) < 10_000_000

    cfg = TalkConfig(input=str(path), max_document_mb=2)
    rejects = Rejects(OnError.quarantine)
    assert not list(read_documents(find_units(cfg)[0], cfg, rejects))
    assert [row["detail"] for row in rejects.rows] == ["list", "list"]
    rejects = Rejects(OnError.quarantine)
    unit = find_units(cfg)[0]
    (talk,) = read_talks(unit, cfg, rejects)
    assert [message["content"] for message in talk.messages] == ["b"]
    assert [row["reason"] for row in rejects.rows] == ["too_large"]
    with pytest.raises(DataError, match="a row of .* bytes is no record"):
        list(read_records(unit.pieces[0]))


@pytest.mark.parametrize("kind", ["more values than bits", "values of one length"])
def test_lists_that_no_dictionary_can_bound_are_damage(tmp_path, monkeypatch, kind):
    """A run of places takes a few bytes whatever its length; and pyarrow keeps no dictionary of values of one length."""
    monkeypatch.setattr(tables, "MOST_VALUES", 100)
    monkeypatch.setattr(tables, "BYTES_PER_BATCH", 5500)
    is_bits = kind == "more values than bits"
    values = pa.array(["a"] * 90_000) if is_bits else pa.array([b"y" * 5000] * 90, pa.binary(5000))
    lists = pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
    pq.write_table(pa.table({"text": lists}), tmp_path / "a.parquet", compression="zstd")
    cfg = InputConfig(input=str(tmp_path / "a.parquet"))
    rejects = Rejects(OnError.quarantine)
    assert not list(read_documents(find_units(cfg)[0], cfg, rejects))
    (row,) = rejects.rows
    assert row["reason"] == "damaged_file"
    assert ("90000 values in" if is_bits else "repeats a large value") in row["detail"]


def test_small_row_groups_are_read_together(tmp_path):
    """A row group costs pyarrow 0.3 ms to begin, however small: 10^6 of one row took 12 minutes of CPU."""
    rows = ["a" * 50] * 600 + ["b" * 90_000_000] + ["c"] * 3
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=1)
    with (tmp_path / "a.parquet").open("rb") as file:
        parquet = pq.ParquetFile(file)
        runs = [
            (len(numbers), count) for numbers, count, _ in tables._runs(file, parquet, ["text"])
        ]
        assert runs == [(256, 256), (256, 256), (88, 256), (1, 1), (3, 256)]
        _, batches = tables.open_table(documents.Format.parquet, file)
        read = [text[:1] for batch in batches(["text"]) for text in batch.column(0).to_pylist()]
    assert read == [row[:1] for row in rows]
