"""Where given documents lie in a dataset: the same ids, wherever the shards have put them.

    texts --encode--> ids --blake2b--> wanted
    blocks in order -> documents of a wanted length -> the same digest? -> Place

One pass over the dataset; of it, one document at a time is in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.sources.rejects import Document
from data_prep.tokens.browse import blocks
from data_prep.tokens.encode import Encoder
from pipeline.data.manifest import Manifest

BATCH = 256  # documents encoded at once


@dataclass(frozen=True)
class Span:
    """A stretch of tokens of one shard."""

    shard: int
    begin: int
    """First token, counted from the shard's beginning."""
    end: int
    """Past the last one, the token that ends the document."""


@dataclass(frozen=True)
class Place:
    """A document of the dataset that is one of those given."""

    given: str
    """File and place of the document that was asked for."""
    document: int
    """Its number in the dataset, counted from 0 in the order of the shards."""
    spans: tuple[Span, ...]
    """Its tokens; more than one where it runs over the end of a shard."""


class Wanted:
    """Documents to look for, as digests of their ids."""

    def __init__(self, documents: Iterable[Document], encoder: Encoder, manifest: Manifest) -> None:
        """Encode them as the dataset was: equal text has equal ids."""
        self.lengths: set[int] = set()
        self.given: dict[bytes, str] = {}
        self._eod, self._dtype = manifest.tokenizer.eod, manifest.dtype
        waiting: list[Document] = []
        for document in documents:
            waiting.append(document)
            if len(waiting) == BATCH:
                self._add(waiting, encoder)
                waiting = []
        self._add(waiting, encoder)

    def _add(self, documents: list[Document], encoder: Encoder) -> None:
        if not documents:
            return
        ids, lengths = encoder.encode([document.text for document in documents])
        pieces = np.split(ids, np.cumsum(lengths)[:-1])
        for document, piece in zip(documents, pieces, strict=True):
            whole = np.append(piece, self._eod).astype(self._dtype)
            self.lengths.add(len(whole))
            self.given.setdefault(_digest(whole), document.id)


def find(manifest: Manifest, wanted: Wanted) -> Iterator[Place]:
    """Every document of the dataset whose ids are those of one that is wanted, copies too."""
    bounds = np.concatenate([[0], np.cumsum(manifest.shard_tokens)])
    for number, begin, ids in _documents(manifest, wanted.lengths):
        if (given := wanted.given.get(_digest(ids))) is not None:
            yield Place(given, number, tuple(_spans(bounds, begin, begin + len(ids))))


def _documents(manifest: Manifest, lengths: set[int]) -> Iterator[tuple[int, int, np.ndarray]]:
    """(number, first token in the dataset, ids) of the documents that have one of these lengths."""
    longest = max(lengths, default=0)
    number, begin, at, size = -1, 0, 0, 0  # of the document that is open at the token `at`
    parts: list[np.ndarray] = []  # its ids; none are kept once it is longer than any wanted
    for tokens, starts, *_ in blocks(manifest, 0):
        edges = [0, *starts.tolist(), len(tokens)]
        for place, (first, last) in enumerate(zip(edges, edges[1:])):
            if place:  # a document begins here, so the open one has ended
                if number >= 0 and size in lengths:
                    yield number, begin, np.concatenate(parts)
                number, begin, size, parts = number + 1, at + first, 0, []
            size += last - first
            parts = [*parts, tokens[first:last]] if size <= longest else []
        at += len(tokens)
    if number >= 0 and size in lengths:
        yield number, begin, np.concatenate(parts)


def _spans(bounds: np.ndarray, begin: int, end: int) -> Iterator[Span]:
    """Tokens [begin, end) of the dataset, cut at the shards' `bounds`."""
    shard = int(np.searchsorted(bounds, begin, "right")) - 1
    while begin < end:
        stop = min(end, int(bounds[shard + 1]))
        if stop > begin:
            yield Span(shard, begin - int(bounds[shard]), stop - int(bounds[shard]))
        begin, shard = stop, shard + 1


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
