"""Arrow arrays whose places are wrong."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from data_prep.sources.arrow_checks import check_places
from data_prep.sources.documents import read_documents
from data_prep.sources.inputs import InputConfig, OnError, find_units
from data_prep.sources.rejects import Rejects
from data_prep.sources.tables import row_bytes

OFFSETS = pa.py_buffer(np.array([0, 1 << 30, 2], "<i4").tobytes())
TEXTS = pa.Array.from_buffers(pa.string(), 2, [None, OFFSETS, pa.py_buffer(b"ab")])
OUTSIDE = {
    "texts": TEXTS,
    "lists": pa.Array.from_buffers(pa.list_(pa.int8()), 2, [None, OFFSETS], children=[pa.array([1, 2], pa.int8())]),
    "texts of structs": pa.StructArray.from_arrays([TEXTS], ["x"]),
    "values of a dictionary": pa.DictionaryArray.from_arrays(pa.array([7], pa.int8()), pa.array(["a"]), safe=False),
}  # fmt: skip
INSIDE = [
    pa.array(["a", None]),
    pa.array([[1, 2], [], None]),
    pa.array([{"a": [{"b": "x"}]}, None]),
    pa.array(["a", "b", None]).dictionary_encode(),
    pa.array(["a" * 20], pa.string_view()),
    pa.array([[1], [2], [3]]).slice(1, 2),
    pa.array([], pa.list_(pa.int64())),
    pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
    pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(bytes(4) + b"\1\0\0\0"), pa.py_buffer(b"\xff")]),
]  # fmt: skip


@pytest.mark.parametrize("kind", OUTSIDE)
def test_places_outside_of_an_arrow_file_are_damage(tmp_path, kind):
    """pyarrow reads them as they are: another process's bytes would be text, or the worker dies."""
    with pytest.raises(pa.ArrowInvalid):
        check_places(OUTSIDE[kind])
    table = pa.table({"text": OUTSIDE[kind]})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as stream:
        stream.write_table(table)
    cfg, found = InputConfig(input=str(tmp_path / "a.arrow")), Rejects(OnError.quarantine)
    assert list(read_documents(find_units(cfg)[0], cfg, found)) == []
    assert [row["reason"] for row in found.rows] == ["damaged_file"]


@pytest.mark.parametrize("array", INSIDE, ids=lambda array: str(array.type)[:9])
def test_places_inside_are_none(array):
    """Nor is a text that is not UTF-8: that is a reject of its own row."""
    check_places(array)
    assert len(row_bytes(pa.record_batch([array], ["x"]))) == len(array)
