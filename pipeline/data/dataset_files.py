"""The bytes of a dataset: small files from anywhere, blocks of local tars without reading them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.data.shard_format import Block, ShardLayout
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
                np.memmap(path, dtype, "r", int(row[f"{kind}_offset"]), (int(row[count]),))
                if row[count]  # an empty map is an error
                else np.empty(0, dtype)
                for kind, dtype, count in layout.members
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


def read_bytes(path: str, *, most: int = MOST_BYTES) -> bytes:
    """Content of a file of a dataset, local or at an address that fsspec understands.

    Raises:
        DataError: it cannot be read, or has more than `most` bytes.
    """
    try:
        if "://" not in path:
            return read_file(path, most=most, inside=Path(path).parent)
        return read_small(*connect(path), most=most)
    except Exception as error:  # every fsspec file system raises its own
        raise DataError(
            f"{path} cannot be read: {reason_of(error)}. A dataset is a folder that "
            "data_prep/tokenize.py has written; its manifest.json appears when the last piece of "
            "work is done."
        ) from error
