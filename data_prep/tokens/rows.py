"""Dialogues packed into rows of equal length, first fit, in the order they come.

    add(dialogue) -> the first of the last OPEN_ROWS rows with room, else a new row
    row that is no longer among them -> tokens, starts, loss -> writer

What is left of a row is one more document, of EOD, that nobody learns. The rows are a function of
the dialogues and their order alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pipeline.data.pictures import picture_starts
from pipeline.data.shard_format import LOSS_DTYPE, Block, ShardLayout

# Rows of 256 tokens, 25,892 dialogues: 95.1 % full; one dialogue a row 29.5 %.
OPEN_ROWS = 64


class Dialogue(NamedTuple):
    """One document of a row."""

    ids: np.ndarray
    """(n,) token ids; at most a row."""
    loss: np.ndarray
    """(n,) uint8: 1 where the token is to be predicted."""
    name: str = ""
    """For provenance."""
    text_bytes: int = 0
    """UTF-8 bytes of its text."""
    images: np.ndarray | None = None
    """(pictures, 3, image_size, image_size) uint8, in the order of their placeholders."""


def documents_of(block: Block, layout: ShardLayout) -> Iterator[Dialogue]:
    """The documents of a block of rows, the padding of each row among them."""
    tokens, starts, loss, images = block
    assert loss is not None, "packed rows have a mask"
    places = None if layout.pictures is None else picture_starts(tokens, layout.pictures)
    bounds = [*starts.tolist(), len(tokens)]
    for begin, end in zip(bounds, bounds[1:]):
        mine = None
        if images is not None and places is not None:
            first, last = np.searchsorted(places, (begin, end))
            mine = images[first:last]
        yield Dialogue(tokens[begin:end], loss[begin:end], images=mine)


@dataclass
class _Row:
    room: int
    dialogues: list[tuple[int, Dialogue]] = field(default_factory=list)  # with their numbers


class RowPacker:
    """Packs dialogues, and hands on whole rows."""

    def __init__(
        self,
        layout: ShardLayout,
        *,
        eod: int,
        write: Callable[
            [np.ndarray, np.ndarray, list[str], int, np.ndarray, np.ndarray | None], None
        ],
    ) -> None:
        """Pack for a layout with row_tokens.

        Args:
            layout: type of the ids, and length of a row.
            eod: id of the padding.
            write: gets (tokens, starts, names, text bytes, loss, images) of each row, in order.
        """
        assert layout.row_tokens is not None
        self._size, self._dtype, self._eod, self._write = (
            layout.row_tokens,
            layout.dtype,
            eod,
            write,
        )
        self._open: deque[_Row] = deque()
        self._num_written = 0
        self.places: list[int] = []
        """Of each dialogue in the order it came: its number among the documents written."""

    def add(self, dialogue: Dialogue) -> None:
        """Give a dialogue its place."""
        size = len(dialogue.ids)
        row = next((row for row in self._open if row.room >= size), None)
        if row is None:
            row = _Row(self._size)
            self._open.append(row)
            if len(self._open) > OPEN_ROWS:
                self._finish(self._open.popleft())
        row.room -= size
        row.dialogues.append((len(self.places), dialogue))
        self.places.append(-1)

    def close(self) -> None:
        """Write the rows that are still open."""
        while self._open:
            self._finish(self._open.popleft())

    def _finish(self, row: _Row) -> None:
        """Write one row, its padding as a document of its own."""
        tokens = np.full(self._size, self._eod, self._dtype)
        loss, at = np.zeros(self._size, LOSS_DTYPE), 0
        starts: list[int] = []
        names: list[str] = []
        for number, dialogue in row.dialogues:
            end = at + len(dialogue.ids)
            tokens[at:end], loss[at:end] = dialogue.ids, dialogue.loss
            self.places[number] = self._num_written + len(starts)
            starts.append(at)
            names.append(dialogue.name)
            at = end
        if row.room:
            starts.append(at)
            names.append(names[-1])
        self._num_written += len(starts)
        text_bytes = sum(dialogue.text_bytes for _, dialogue in row.dialogues)
        images = [d.images for _, d in row.dialogues if d.images is not None]
        whole = np.concatenate(images) if images else None
        self._write(tokens, np.array(starts, np.int64), names, text_bytes, loss, whole)
