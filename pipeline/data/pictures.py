"""Placeholders and pictures: which ids of a row stand for which picture.

    ids of a dialogue, one placeholder a picture --spread--> one a patch, never to be predicted
    ids of whole rows --picture_rows--> the row of each picture

Only numpy.
"""

from __future__ import annotations

import numpy as np

from pipeline.data.shard_format import Pictures


def spread(ids: np.ndarray, loss: np.ndarray, pictures: Pictures) -> tuple[np.ndarray, np.ndarray]:
    """(ids, loss) with num_patches placeholders instead of each one; none is to be predicted.

    Args:
        ids: (n,) of a dialogue, in which each picture is one placeholder.
        loss: (n,) uint8, 1 where the token is to be predicted.
        pictures: how many, and which id they are.
    """
    is_image = ids == pictures.image_token_id
    counts = np.where(is_image, pictures.num_patches, 1)
    return np.repeat(ids, counts), np.repeat(np.where(is_image, 0, loss), counts).astype(loss.dtype)


def gathered(ids: np.ndarray, pictures: Pictures) -> np.ndarray:
    """Which of (n,) ids to keep, (n,) bool, so that a picture is one placeholder again."""
    keep = ids != pictures.image_token_id
    keep[picture_starts(ids, pictures)] = True
    return keep


def picture_starts(tokens: np.ndarray, pictures: Pictures) -> np.ndarray:
    """(pictures,) int64: where in (n,) ids the first placeholder of each picture is."""
    return np.flatnonzero(tokens == pictures.image_token_id)[:: pictures.num_patches]


def picture_rows(tokens: np.ndarray, pictures: Pictures, row_tokens: int) -> np.ndarray:
    """(pictures,) int64: the row of each picture whose placeholders are among (n,) ids.

    Args:
        tokens: whole rows.
        pictures: id and number of a picture's placeholders.
        row_tokens: of a row.

    Raises:
        ValueError: a run of placeholders is no whole number of pictures, or is cut by a row's end.
    """
    places, size = np.flatnonzero(tokens == pictures.image_token_id), pictures.num_patches
    if len(places) % size:
        raise ValueError(
            f"{len(places)} placeholders, not a multiple of {size}, those of a picture"
        )
    first, last = places[::size], places[size - 1 :: size]
    apart = (last - first != size - 1) | (first // row_tokens != last // row_tokens)
    if apart.any():
        place = int(first[apart.argmax()])
        raise ValueError(
            f"placeholders from token {place} on that are not {size} in one run inside one row"
        )
    return first // row_tokens
