"""Keys by which repeats are found: blake2b for exact ones, a hash a band for MinHash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from data_prep.cleaning import recipes

_WORD = re.compile(r"\w+")
_SPACE = re.compile(r"\s+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def exact_key(text: str, cfg: recipes.ExactDedup) -> np.ndarray:
    """The text's blake2b of 128 bits as (2,) uint64."""
    if cfg.ignore_case_and_space:
        text = _SPACE.sub(" ", text).strip().lower()
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), "<u8")


def minhash_keys(texts: Sequence[str], cfg: recipes.MinHashDedup) -> np.ndarray:
    """(len(texts), bands) uint64: hash of the `rows` minima of each band.

    A text of fewer words than n_gram is one shingle, so short texts are near-duplicates only of
    their equals; a text without a word gets random-looking keys of its own bytes.
    """
    from rensa import RMinHash

    shingles = [_shingles(text, cfg.n_gram) for text in texts]
    offsets = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(shingles), offsets, cfg.bands * cfg.rows, cfg.seed
    )
    minima = np.array(matrix.to_rows(), np.uint64).reshape(len(texts), cfg.bands, cfg.rows)
    return _mix(minima)


def _shingles(text: str, n_gram: int) -> np.ndarray:
    """Hashes of the runs of n_gram words, uint64; at least one."""
    words = _WORD.findall(text.lower())
    if not words:
        return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), "<u8")
    hashes = np.array([_word_hash(word) for word in words], np.uint64)
    width = min(n_gram, len(words))
    return _mix(np.lib.stride_tricks.sliding_window_view(hashes, width))


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _mix(values: np.ndarray) -> np.ndarray:
    """(..., n) -> (...) uint64, dependent on the order of the n values."""
    result = np.zeros(values.shape[:-1], np.uint64)
    for column in range(values.shape[-1]):
        result = (result ^ values[..., column]) * _MULTIPLIER
        result ^= result >> np.uint64(32)
    return result
