"""What pyarrow does not look at when it reads a stranger's arrow file."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

import numpy as np

from data_prep.sources.pieces import Damaged

ARROW_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # continuation mark, and a length of 0


def check_places(array: Any) -> None:
    """Refuse an arrow array whose values would lie outside of it: pyarrow reads them as they are.

    Texts that are not UTF-8 pass: each is a reject of its own.

    Raises:
        pyarrow.ArrowInvalid: a place is wrong, at whatever depth.
    """
    import pyarrow as pa

    kind = array.type
    array.validate()
    if pa.types.is_dictionary(kind):
        places = array.indices.drop_null().to_numpy()
        if len(places) and not 0 <= places.min() <= places.max() < len(array.dictionary):
            raise pa.ArrowInvalid("a value is not in its dictionary")
        check_places(array.dictionary)
    elif pa.types.is_struct(kind):
        for number in range(kind.num_fields):
            check_places(array.field(number))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        steps, last = np.diff(array.offsets.to_numpy()), len(array.values)
        if (steps < 0).any() or len(array) and array.offsets[-1].as_py() > last:
            raise pa.ArrowInvalid("the places of a list's values are not ascending")
        check_places(array.values)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        array.cast(pa.binary() if pa.types.is_string(kind) else pa.large_binary()).validate(
            full=True
        )
    elif pa.types.is_string_view(kind):
        array.view(pa.binary_view()).validate(full=True)
    else:
        array.validate(full=True)


def check_stream_end(file: BinaryIO) -> None:
    """Refuse an arrow stream that was cut between two batches: pyarrow takes it for a short one.

    Raises:
        Damaged: its end mark is missing.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - len(ARROW_STREAM_END), 0))
    if file.read() != ARROW_STREAM_END:
        raise Damaged("the arrow stream has no end mark")


def check_nothing_follows(file: Any) -> None:
    """Refuse what lies behind an arrow stream that was read to its end: pyarrow looks no further.

    Raises:
        Damaged: there is something, such as a second stream.
    """
    end = file.tell()
    if file.seek(0, io.SEEK_END) != end:
        raise Damaged("data follows the end of the arrow stream; join tables, not their files")
