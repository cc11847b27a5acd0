"""The bytes of a dataset: small files from anywhere, blocks of local tars without reading them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.pictures import picture_rows
from pipeline.data.shard_format import Block, Pictures, ShardLayout
from pipeline.errors import DataError, ShardError
from pipeline.files import read_file, regular_file
from pipeline.remote import connect, read_small, reason_of

MOST_BYTES = 1 << 30
"""Of manifest.json, index.npy, tokenizer.json: those of 10^13 tokens have a third of it."""


def map_block(path: str, row: np.void, layout: ShardLayout) -> Block:
    """A block, mapped from a local tar by its index row.

    Raises:
        ShardError: the tar is missing or shorter than the row says.
    """
    try:
        regular_file(path, inside=Path(path).parents[2])
        return Block(
            *(
                np.memmap(
                    path,
                    member.dtype,
                    "r",
                    int(row[f"{member.kind}_offset"]),
                    (int(row[member.length]), *member.shape),
                )
                if row[member.length]  # an empty map is an error
                else np.empty((0, *member.shape), member.dtype)
                for member in layout.members
            )
        )
    except (OSError, ValueError) as error:
        raise ShardError(
            f"{path} is missing or truncated ({error}). Copy or prepare the dataset again."
        ) from error


def check_ids(tokens: np.ndarray, vocab_size: int, place: str, way_out: str) -> None:
    """Refuse (n,) ids that the dataset's tokenizer does not have.

    An id without an embedding ends in an index error on one rank, and in a silently wrong row on
    tensor-parallel ranks. The largest of 1 Mi ids is found in 0.1 ms.

    Raises:
        ShardError: with the place and the way out.
    """
    if (largest := int(tokens.max(initial=0))) >= vocab_size:
        raise ShardError(
            f"{place} holds the id {largest}; the dataset's tokenizer has the ids 0 to "
            f"{vocab_size - 1}. {way_out}"
        )


def check_starts(starts: np.ndarray, num_tokens: int, place: str, way_out: str) -> None:
    """Refuse (n,) places of documents that are not ascending in their block; raises ShardError."""
    if len(starts) and (starts[-1] >= num_tokens or (starts[1:] <= starts[:-1]).any()):
        raise ShardError(
            f"{place}: the places where documents begin are not ascending below {num_tokens}. "
            f"{way_out}"
        )


def check_pictures(
    tokens: np.ndarray,
    num_images: int,
    pictures: Pictures,
    row_tokens: int,
    place: str,
    way_out: str,
) -> np.ndarray:
    """(num_images,) int64: the row of each picture of (n,) ids, which are whole rows.

    With more placeholders than pictures a model would see another row's picture, or the last one
    again, and nothing would say so.

    Raises:
        ShardError: placeholders and pictures do not fit; with the place and the way out.
    """
    try:
        rows = picture_rows(tokens, pictures, row_tokens)
        if len(rows) != num_images:
            raise ValueError(f"placeholders of {len(rows)} pictures, and {num_images} pictures")
    except ValueError as error:
        raise ShardError(f"{place} has {error}. {way_out}") from None
    return rows


def read_bytes(path: str, *, most: int = MOST_BYTES) -> bytes:
    """Content of a file of a dataset, local or at an address that fsspec understands.

    Raises:
        DataError: it cannot be read, or has more than `most` bytes.
    """
    try:
        if "://" not in path:
            return read_file(path, most=most, inside=Path(path).parent)
        return read_small(*connect(path), most=most)
    except NotADirectoryError as error:
        file = next(parent for parent in Path(path).parents if parent.is_file())
        raise DataError(
            f"{file} is a file, and a dataset is a folder. Make one of it: python -m "
            f"data_prep.tokenize {file} OUT tokenizer=T.json, then data.path=OUT."
        ) from error
    except Exception as error:  # every fsspec file system raises its own
        raise DataError(
            f"{path} cannot be read: {reason_of(error)}. A dataset is a folder that "
            "data_prep/tokenize.py has written; its manifest.json appears when the last piece of "
            "work is done."
        ) from error


def npy_rows(raw: Any, row_dtype: np.dtype) -> np.ndarray:
    """(rows,) of row_dtype of an index.npy's bytes, a view of them.

    Raises:
        ValueError: not a one-dimensional npy array of that type.
    """
    stream = io.BytesIO(bytes(raw[:4096]))  # numpy's headers end long before
    major, minor = np.lib.format.read_magic(stream)
    if (major, minor) != (1, 0):
        raise ValueError(f"it is an npy file of version {major}.{minor}, not 1.0")
    try:
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # numpy parses a damaged header as Python: whatever that raises
        raise ValueError(f"its header is damaged: {error}") from None
    if dtype != row_dtype or len(shape) != 1 or fortran_order:
        raise ValueError(f"it holds {shape} of {dtype}, not rows of {row_dtype.itemsize} bytes")
    body = raw[stream.tell() :]
    if len(body) != shape[0] * row_dtype.itemsize:
        raise ValueError(f"it holds {len(body)} bytes of rows, its header says {shape[0]} rows")
    return np.frombuffer(body, row_dtype)
