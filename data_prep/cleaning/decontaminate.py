"""Does a document hold a run of words that an evaluation set holds too?

    evaluation sets -> words -> ids -> 64-bit hash of each n-gram, kept sorted
    document        -> words -> ids -> hashes in one numpy pass -> looked up

Words that no evaluation set knows get the id 0, and no n-gram with a 0 can be a hit; so nearly
every document is done after one look-up a word. Hits are not compared word by word: 10 trillion
words against a million n-grams, one word in a thousand beginning an n-gram of known words only,
give 0.0005 false hits.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ConfigError, DataError

_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(
    0x9E3779B97F4A7C15
)  # odd, from the golden ratio: the hash is a polynomial in it modulo 2^64


def decontaminate(
    sets: Sequence[str], *, fields: Sequence[str], n_gram: int, min_n_gram: int
) -> Callable[[str], str | None]:
    """A function from a text to the name of an evaluation set it overlaps with, or None.

    Args:
        sets: .jsonl and .txt files or globs.
        fields: fields of the .jsonl records to take; empty: every string, however deep.
        n_gram: words that must agree in a row.
        min_n_gram: evaluation texts of so many words up to n_gram - 1 must agree as a whole;
            shorter ones do not count.
    """
    known: dict[str, int] = {}
    names: list[str] = []
    found: dict[
        int, list[tuple[np.ndarray, int]]
    ] = {}  # n-gram length -> [(hashes, place in names)]
    for path in _files(sets):
        names.append(path.stem)
        for text in _texts(path, fields):
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
    """Hash of each window of `length` ids along the last axis: (..., n) -> (..., n - length + 1), uint64."""
    windows = ids.shape[-1] - length + 1
    value = np.zeros((*ids.shape[:-1], windows), np.uint64)
    for offset in range(length):
        value = value * _MULTIPLIER + ids[..., offset : offset + windows]
        value ^= value >> np.uint64(29)
    return value


def _files(sets: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for pattern in sets:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise ConfigError(f"decontaminate.sets: no file matches {pattern}.")
        files += map(Path, found)
    return files


def _texts(path: Path, fields: Sequence[str]) -> Iterator[str]:
    if path.suffix not in (".jsonl", ".txt"):
        raise ConfigError(f"decontaminate.sets: {path} is neither .jsonl nor .txt.")
    if path.suffix == ".txt":
        yield path.read_text()
        return
    with path.open() as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number} is not JSON: {error}.") from error
            yield from _strings({f: record[f] for f in fields if f in record} if fields else record)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
