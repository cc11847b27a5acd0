"""What happens to the documents of one work unit in one pass of a recipe.

    documents -> repeats named after the pass before go -> steps
    -> survivors, dropped ones, tally, keys

Nothing here knows about files or workers; stages.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from data_prep.cleaning import hashing, recipes
from data_prep.cleaning.filters import Drop, Step
from data_prep.sources.rejects import Document

BATCH_DOCUMENTS = 256
_COLUMNS = ("documents_in", "bytes_in", "documents_out", "bytes_out", "documents_changed")

OnDrop = Callable[[Document, str, str, int], None]


@dataclass
class Tally:
    """Documents and bytes of UTF-8 by step; units are added up, in any order."""

    steps: dict[str, dict[str, int]] = field(default_factory=dict)
    """step -> documents_in, bytes_in, documents_out, bytes_out, documents_changed."""
    reasons: dict[str, dict[str, int]] = field(default_factory=dict)
    """step:reason -> documents, bytes."""

    def expect(self, steps: Iterable[str]) -> None:
        """Give these steps a row even if no document reaches them."""
        for step in steps:
            self.steps.setdefault(step, dict.fromkeys(_COLUMNS, 0))

    def record(self, step: str, before: int, after: int, *, changed: bool) -> None:
        """A document of `before` bytes left the step with `after` bytes."""
        row = self.steps[step]
        for column, value in zip(_COLUMNS, (1, before, 1, after, int(changed))):
            row[column] += value

    def record_drop(self, step: str, reason: str, before: int) -> None:
        """A document of `before` bytes did not leave the step."""
        self.steps[step]["documents_in"] += 1
        self.steps[step]["bytes_in"] += before
        entry = self.reasons.setdefault(f"{step}:{reason}", {"documents": 0, "bytes": 0})
        entry["documents"] += 1
        entry["bytes"] += before

    def record_reject(self, reason: str) -> None:
        """A document could not be read; its size is not known."""
        self.reasons.setdefault(f"input:{reason}", {"documents": 0, "bytes": 0})["documents"] += 1

    def add(self, other: dict[str, Any]) -> None:
        """Add the tally of another unit, as asdict() gives it."""
        for mine, theirs in ((self.steps, other["steps"]), (self.reasons, other["reasons"])):
            for name, row in theirs.items():
                into = mine.setdefault(name, dict.fromkeys(row, 0))
                for key, value in row.items():
                    into[key] += value


def clean_documents(
    documents: Iterable[Document],
    *,
    repeats: dict[int, str],
    dedups: tuple[str, ...],
    steps: list[tuple[str, Step]],
    on_drop: OnDrop,
    tally: Tally,
) -> Iterator[Document]:
    """The documents that are no repeats and that every step keeps, with the text the steps leave.

    Args:
        documents: of one unit, in order.
        repeats: place in `documents` -> the deduplication that found it a repeat.
        dedups: the deduplications of the pass before, in their order.
        steps: names and functions.
        on_drop: called with (document, step, reason, bytes) for each document that does not come
            out.
        tally: counts are added here.
    """
    tally.expect([*dedups, *(name for name, _ in steps)])
    for row, document in enumerate(documents):
        size = len(document.text.encode())
        for step in dedups:
            if repeats.get(row) == step:
                tally.record_drop(step, "repeat", size)
                on_drop(document, step, "repeat", size)
                break
            tally.record(step, size, size, changed=False)
        if row in repeats:
            continue
        for step, function in steps:
            verdict = function(document) or Drop("empty")
            if isinstance(verdict, Drop):
                tally.record_drop(step, verdict.reason, size)
                on_drop(document, step, verdict.reason, size)
                break
            changed = verdict != document.text
            after = len(verdict.encode()) if changed else size
            tally.record(step, size, after, changed=changed)
            if changed:
                document, size = replace(document, text=verdict), after
        else:
            yield document


class KeyCollector:
    """Keys of one unit's survivors for the deduplications of a pass."""

    def __init__(self, dedups: tuple[str, ...], recipe: recipes.Recipe):
        self._recipe = recipe
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in dedups}
        self._waiting: list[str] = []

    def add(self, text: str) -> None:
        """Note the next survivor."""
        if not self._parts:
            return
        self._waiting.append(text)
        if len(self._waiting) == BATCH_DOCUMENTS:
            self._hash()

    def columns(self) -> dict[str, np.ndarray]:
        """(columns, survivors) of key_dtype for each deduplication, every column sorted."""
        self._hash()
        result = {}
        for name, parts in self._parts.items():
            dtype = key_dtype(name)
            num_columns = 1 if name == "exact_dedup" else self._recipe.minhash_dedup.bands
            empty = np.zeros((0, num_columns, *dtype["key"].shape), "<u8")
            keys = np.concatenate([empty, *parts])
            table = np.zeros((num_columns, len(keys)), dtype)
            table["key"] = keys.swapaxes(0, 1)
            table["row"] = np.arange(len(keys))
            result[name] = np.stack([column[np.lexsort(column["key"].T)] for column in table])
        return result

    def _hash(self) -> None:
        texts, self._waiting = self._waiting, []
        if not texts:
            return
        for name, parts in self._parts.items():
            if name == "exact_dedup":
                keys = np.stack([hashing.exact_key(t, self._recipe.exact_dedup) for t in texts])
                parts.append(keys[:, None, :])
            else:
                parts.append(hashing.minhash_keys(texts, self._recipe.minhash_dedup)[:, :, None])


def key_dtype(name: str) -> np.dtype:
    """(key, row) of a deduplication; columns are sorted by the key's last number first."""
    return np.dtype([("key", "<u8", (2 if name == "exact_dedup" else 1,)), ("row", "<u4")])
