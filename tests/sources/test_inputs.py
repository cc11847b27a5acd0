"""What an input names, beside what it was meant to name: said, never doubled or added in silence."""

import gzip
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.sources.documents import read_documents
from data_prep.sources.inputs import InputConfig, OnError, find_units
from data_prep.sources.rejects import Rejects
from data_prep.tokens.dataset_writer import check_rejected
from pipeline.errors import ConfigError, DataError
from tests.support.corpus import write_jsonl


def read(path, **settings):
    cfg = InputConfig(input=str(path), **settings)
    return [d for unit in find_units(cfg) for d in read_documents(unit, cfg, Rejects(OnError.fail))]


@pytest.mark.parametrize(
    "again", ["F,F/a.jsonl", "F/a.jsonl,F/../F/a.jsonl", "F/a.jsonl,L/a.jsonl"]
)
def test_a_file_that_is_named_twice_is_said(tmp_path, caplog, again):
    """Whatever the spelling: through a link to its folder, as in a cache of downloads, too."""
    write_jsonl(tmp_path / "F" / "a.jsonl", ["x"])
    (tmp_path / "L").symlink_to(tmp_path / "F")
    words = ",".join(f"{tmp_path}/{path}" for path in again.split(","))
    assert [d.text for d in read(words)] == ["x", "x"]
    assert "names 1 files more than once" in caplog.text


def test_a_file_beside_its_compressed_copy_is_said(tmp_path, caplog):
    """`gunzip -k` leaves both."""
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    path.with_name("a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    write_jsonl(tmp_path / "b.jsonl", ["y"])
    assert [d.text for d in read(tmp_path)] == ["x", "x", "y"]
    assert "holds 1 files compressed and not, such as" in caplog.text
    caplog.clear()
    assert [d.text for d in read(tmp_path, exclude="*.gz")] == ["x", "y"]
    assert not caplog.text


def test_a_readme_among_tables_is_said(tmp_path, caplog):
    """A dataset's repository holds both."""
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text("about")
    assert sorted(d.text for d in read(tmp_path)) == ["about", "x"]
    assert (
        "files of records and of text" in caplog.text
        and "README.md, is one document" in caplog.text
    )
    caplog.clear()
    assert [d.text for d in read(tmp_path, include=".parquet")] == ["x"]
    assert not caplog.text


@pytest.mark.parametrize("name", ["max_document_mb", "unit_mb"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_sizes_are_finite_and_above_0(tmp_path, name, value):
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(ConfigError, match=rf"{name} \(.*must be above 0 and finite"):
        find_units(InputConfig(input=str(tmp_path), **{name: value}))


def test_a_ceiling_that_is_no_number_holds_nothing_back_unsaid():
    """Nine of ten are more than NaN; none are not less."""
    check_rejected(1, Counter(empty=9), 0.0)
    with pytest.raises(
        DataError, match="9 of 10 documents were rejected.*max_rejected_fraction=nan"
    ):
        check_rejected(1, Counter(broken_json=9), float("nan"))
