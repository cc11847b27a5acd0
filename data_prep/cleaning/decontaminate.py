"""Does a document hold a run of words that an evaluation set holds too?

    evaluation sets -> words -> ids -> 64-bit hash of each n-gram, kept sorted
    document        -> words -> ids -> hashes in one numpy pass -> looked up

Words that no evaluation set knows get the id 0, and no n-gram with a 0 can be a hit; so nearly
every document is done after one look-up a word. Hits are not compared word by word: 10 trillion
words against a million n-grams, one word in a thousand beginning an n-gram of known words only,
give 0.0005 false hits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from data_prep.sources.inputs import InputConfig, find_files
from data_prep.sources.kinds import is_compressed
from data_prep.sources.pieces import Piece
from data_prep.sources.records import read_records
from pipeline.errors import ConfigError, DataError

_WORD = re.compile(r"\w+")
# Odd, from the golden ratio: the hash is a polynomial in it modulo 2^64.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def decontaminate(
    sets: Sequence[str], *, fields: Sequence[str], n_gram: int, min_n_gram: int
) -> Callable[[str], str | None]:
    """A function from a text to the name of an evaluation set it overlaps with, or None.

    Args:
        sets: files, folders, globs or addresses, as `input=` takes them.
        fields: fields of records and columns of tables to take; empty: every string, however deep.
        n_gram: words that must agree in a row.
        min_n_gram: evaluation texts of so many words up to n_gram - 1 must agree as a whole;
            shorter ones do not count.
    """
    known: dict[str, int] = {}
    names: list[str] = []
    # n-gram length -> [(hashes, place in names)]
    found: dict[int, list[tuple[np.ndarray, int]]] = {}
    for piece in _files(sets):
        names.append(_name(piece.path))
        for text in _texts(piece, fields):
            ids = np.array([known.setdefault(w, len(known) + 1) for w in _words(text)], np.uint64)
            length = min(n_gram, len(ids))
            if length >= min_n_gram:
                found.setdefault(length, []).append((_hashes(ids, length), len(names) - 1))
    if not found:
        raise DataError(
            f"the evaluation sets {list(sets)} hold no text of at least {min_n_gram} words"
            + (f" in the fields {list(fields)}" if fields else "")
            + ". Check decontaminate.sets and decontaminate.fields."
        )
    tables = {length: _table(parts) for length, parts in sorted(found.items())}

    def find(text: str) -> str | None:
        ids = np.array([known.get(word, 0) for word in _words(text)], np.uint64)
        strangers = np.concatenate(([0], np.cumsum(ids == 0)))  # unknown words before each place
        for length, (targets, owners) in tables.items():
            candidates = np.flatnonzero(strangers[length:] == strangers[:-length])
            if len(candidates):
                mine = _hashes(ids, length)[candidates]
                place = np.minimum(np.searchsorted(targets, mine), len(targets) - 1)
                hits = place[targets[place] == mine]
                if len(hits):
                    return names[owners[hits[0]]]
        return None

    return find


def _table(parts: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct hashes, and for each the first evaluation set that holds it."""
    hashes = np.concatenate([hashes for hashes, _ in parts])
    owners = np.repeat([owner for _, owner in parts], [len(hashes) for hashes, _ in parts])
    distinct, first = np.unique(hashes, return_index=True)
    return distinct, owners[first]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """Hash of each window of `length` ids along the last axis, uint64.

    (..., n) -> (..., n - length + 1).
    """
    windows = ids.shape[-1] - length + 1
    value = np.zeros((*ids.shape[:-1], windows), np.uint64)
    for offset in range(length):
        value = value * _MULTIPLIER + ids[..., offset : offset + windows]
        value ^= value >> np.uint64(29)
    return value


def _files(sets: Sequence[str]) -> list[Piece]:
    """The files of all sets, each entry as `input=` takes it."""
    files: list[Piece] = []
    for entry in sets:
        try:
            found = [piece for _, piece in find_files(InputConfig(input=entry))]
        except DataError as error:
            raise ConfigError(f"decontaminate.sets: {error}") from error
        if not found:
            raise ConfigError(f"decontaminate.sets: no file matches {entry}.")
        files += found
    return files


def _name(path: str) -> str:
    """File name without the suffixes of its kind and its compression."""
    bare = path.rpartition("/")[2]
    if is_compressed(bare):
        bare = bare.rpartition(".")[0]
    return bare.rpartition(".")[0] or bare


def _texts(piece: Piece, fields: Sequence[str]) -> Iterator[str]:
    """Every text of a set; of its records the fields that are named, if any are."""
    for record in read_records(piece):
        if fields and isinstance(record, dict):
            yield from _strings({f: record[f] for f in fields if f in record})
        else:
            yield from _strings(record)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
