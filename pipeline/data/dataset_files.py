"""The bytes of a dataset: small files from anywhere, blocks of local tars without reading them."""

from __future__ import annotations

import numpy as np

from pipeline.data.shard_format import Block, ShardLayout
from pipeline.errors import DataError, ShardError
from pipeline.files import regular_file


def map_block(path: str, row: np.void, layout: ShardLayout) -> Block:
    """A block, mapped from a local tar by its index row.

    Raises:
        ShardError: the tar is missing or shorter than the row says.
    """
    try:
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


def read_bytes(path: str) -> bytes:
    """Content of a file of a dataset, local or at an address that fsspec understands.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if "://" not in path:
            return regular_file(path).read_bytes()
        import fsspec

        return bytes(fsspec.open(path, "rb").open().read())
    except Exception as error:  # every fsspec file system raises its own
        reason = (
            "there is no such file"
            if isinstance(error, FileNotFoundError)
            else f"{type(error).__name__}: {error}"
        )
        raise DataError(
            f"{path} cannot be read: {reason}. A dataset is a folder that data_prep/tokenize.py "
            "has written; its manifest.json appears when the last piece of work is done."
        ) from error
