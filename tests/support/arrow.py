"""Arrow files and arrays whose rows share their values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa


def write_arrow(path: Path, array: pa.Array, count: int) -> None:
    """The array `count` times, a batch each."""
    batch = pa.record_batch([array], ["text"])
    with pa.ipc.new_file(str(path), batch.schema) as file:
        for _ in range(count):
            file.write_batch(batch)


def views(value: bytes, count: int) -> pa.Array:
    """Rows that are one value of more than 12 bytes, which they share."""
    row = np.array([len(value), *np.frombuffer(value[:4], "<i4"), 0, 0], "<i4").tobytes()
    buffers = [None, pa.py_buffer(row * count), pa.py_buffer(value)]
    return pa.Array.from_buffers(pa.string_view(), count, buffers)
