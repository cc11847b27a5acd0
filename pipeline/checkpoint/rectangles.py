"""Stored rectangles of a tensor: whether they fill it, and which of them a wanted one meets.

    Entry(shape, rectangles).meeting(offsets, sizes) -> those that share elements with it

A rectangle spans from its first element to its last, counted through the row-major whole, and two
that share an element have spans that meet. ZeRO cuts flat tensors, so its spans lie one behind the
other; tensor parallelism's interleave, a few at a time. Sorted by span, only neighbours are
compared: with thousands of ranks, all with all would be tens of millions for each tensor.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from pipeline.errors import CheckpointError

Sizes = Sequence[int]
Part = tuple[slice, ...]


@dataclass(frozen=True)
class Rectangle:
    """A stored part of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Any
    """Where its bytes are: (file, key), or (file, offset, length) in version 1."""


@dataclass(frozen=True)
class Entry:
    """A whole tensor, as it is stored."""

    shape: tuple[int, ...]
    rectangles: Sequence[Rectangle]

    def meeting(self, offsets: Sizes, sizes: Sizes) -> Iterator[tuple[Rectangle, Part]]:
        """(stored rectangle, the part of the whole that it shares with the wanted one)."""
        ordered, firsts, reached = self._by_span
        first, end = span(self.shape, offsets, sizes)
        # All before have ended where the wanted one begins; all behind begin where it has ended.
        for stored in ordered[bisect_right(reached, first) : bisect_left(firsts, end)]:
            part = shared(stored.offsets, stored.sizes, offsets, sizes)
            if part is not None:
                yield stored, part

    @cached_property
    def _by_span(self) -> tuple[list[Rectangle], list[int], list[int]]:
        """The rectangles by their first element, these, and how far the spans reach up to each."""
        spans = [span(self.shape, r.offsets, r.sizes) for r in self.rectangles]
        order = sorted(range(len(spans)), key=spans.__getitem__)
        return (
            [self.rectangles[i] for i in order],
            [spans[i][0] for i in order],
            list(accumulate((spans[i][1] for i in order), max)),
        )


def span(shape: Sizes, offsets: Sizes, sizes: Sizes) -> tuple[int, int]:
    """(first, end) of a rectangle's elements in the row-major whole; (n, n) of an empty one."""
    first = last = 0
    for whole, offset, size in zip(shape, offsets, sizes, strict=True):
        first, last = first * whole + offset, last * whole + offset + size - 1
    return first, last + 1 if all(sizes) else first


def shared(offsets: Sizes, sizes: Sizes, others: Sizes, other_sizes: Sizes) -> Part | None:
    """The part of the whole that lies in two rectangles; None where none does."""
    part = tuple(
        slice(max(a, b), min(a + n, b + m))
        for a, n, b, m in zip(offsets, sizes, others, other_sizes, strict=True)
    )
    return part if all(side.start < side.stop for side in part) else None


def check_filled(name: str, shape: Sizes, rectangles: Sequence[tuple[Sizes, Sizes]]) -> None:
    """Raise CheckpointError unless (offsets, sizes) fill the shape, each element once.

    Volumes that add up to the whole and no overlap leave no hole.
    """
    if sum(math.prod(sizes) for _, sizes in rectangles) != math.prod(shape):
        raise CheckpointError(f"{name}: the ranks' parts do not fill its {tuple(shape)}: a hole")
    for offsets, sizes in rectangles:
        if any(o < 0 or o + n > whole for o, n, whole in zip(offsets, sizes, shape, strict=True)):
            raise CheckpointError(f"{name}: a part reaches over the edge of {tuple(shape)}")
    spans = [span(shape, *rectangle) for rectangle in rectangles]
    order = sorted(range(len(spans)), key=spans.__getitem__)
    for i, number in enumerate(order):
        for other in order[i + 1 :]:
            if spans[other][0] >= spans[number][1]:
                break
            if shared(*rectangles[number], *rectangles[other]) is not None:
                raise CheckpointError(
                    f"{name}: parts of two ranks overlap at {tuple(rectangles[other][0])}"
                )
