"""What is said of documents that cannot be used; each reason has its case in test_bad_input.py."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.sources.documents import read_documents
from data_prep.sources.inputs import InputConfig, OnError, find_units
from data_prep.sources.rejects import Rejects
from pipeline.errors import DataError


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.tar"])
def test_a_missing_field_names_those_that_are_there(tmp_path: Path, name: str):
    """And the setting that chooses; half a surrogate pair, which JSON can spell, ends nothing."""
    line = b'{"body": "x", "\\ud800": 1}'
    file = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"body": ["x"], "id": ["1"]}), file)
    elif name == "a.tar":
        info = tarfile.TarInfo("1.json")
        info.size = len(line)
        with tarfile.open(file, "w") as tar:
            tar.addfile(info, io.BytesIO(line))
    else:
        file.write_bytes(line + b"\n")
    cfg = InputConfig(input=str(file))
    with pytest.raises(DataError, match="missing_field.*text_field=NAME.*body") as raised:
        list(read_documents(find_units(cfg)[0], cfg, Rejects(OnError.fail)))
    assert str(raised.value).encode(), "what is said can be written"
