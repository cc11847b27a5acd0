"""Which documents are held out: decided by a hash of their content, so that no list is kept."""

from __future__ import annotations

import hashlib

SPLITS = ("train", "validation")
SPLIT_CHARACTERS = 4096  # that decide, with the length, to which split a document goes


def is_held_out(text: str, fraction: float) -> bool:
    """True for `fraction` of all texts; the same for texts that begin alike and are equally long.

    With a larger fraction the documents that were held out stay so.
    """
    if not fraction:
        return False
    digest = hashlib.blake2b(
        f"{len(text)} {text[:SPLIT_CHARACTERS]}".encode(), digest_size=8
    ).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64
