"""The index of stored rectangles: the same answers as comparing all with all, and few comparisons."""

from __future__ import annotations

import math
import random

import pytest

from pipeline.checkpoint import rectangles
from pipeline.checkpoint.rectangles import Entry, Rectangle, check_filled, shared
from pipeline.errors import CheckpointError
from pipeline.model.partition import Partition

Shape = tuple[int, ...]


def cut(shape: Shape, zero: int, *, tensor: int = 1, dim: int = 0) -> list[tuple[Shape, Shape]]:
    """(offsets, sizes) of what ZeRO-3 over `zero` ranks and tensor parallelism store, rank by rank."""
    if shape == ():
        return [((), ())]
    if len(shape) == 3:  # row by row of its matrices
        planes, rows, width = shape
        return [
            ((row // rows, row % rows, column), (1, 1, size))
            for (first, column), (height, size) in cut((planes * rows, width), zero)
            for row in range(first, first + height)
        ]
    local = tuple(n // tensor if i == dim else n for i, n in enumerate(shape))
    found = []
    for rank in range(tensor):
        part = (
            Partition.of(local, dim=dim, tensor_rank=rank, tensor_size=tensor)
            if tensor > 1
            else Partition.of(local)
        )
        size = -(-math.prod(local) // zero)
        for start in range(0, math.prod(local), size):
            stop = min(start + size, math.prod(local))
            tiles = part.rectangles(start, stop, largest=2**24)
            found += [(tuple(offsets), tuple(sizes)) for _, sizes, offsets in tiles]
    return found


def entry_of(shape: Shape, stored: list[tuple[Shape, Shape]]) -> Entry:
    """In no order: ranks finish as they like."""
    shuffled = random.Random(0).sample(stored, len(stored))
    return Entry(shape, [Rectangle(o, s, number) for number, (o, s) in enumerate(shuffled)])


@pytest.mark.parametrize(
    "shape, cuts",
    [
        ((12, 10), dict(zero=7)),
        ((12, 10), dict(zero=3, tensor=2, dim=1)),
        ((3, 40), dict(zero=17)),
        ((4, 6, 5), dict(zero=11)),
        ((30,), dict(zero=8)),
        ((), dict(zero=1)),
    ],
)
def test_the_index_finds_what_comparing_all_with_all_finds(shape: Shape, cuts: dict) -> None:
    """A rectangle that is overlooked would leave memory as it was."""
    entry = entry_of(shape, cut(shape, **cuts))
    check_filled("a", shape, [(r.offsets, r.sizes) for r in entry.rectangles])
    rng = random.Random(1)
    for _ in range(200):
        offsets = tuple(rng.randrange(n) for n in shape)
        sizes = tuple(
            rng.randint(0 if shape == (30,) else 1, n - o) for n, o in zip(shape, offsets)
        )
        found = {stored.place: part for stored, part in entry.meeting(offsets, sizes)}
        parts = {r.place: shared(r.offsets, r.sizes, offsets, sizes) for r in entry.rectangles}
        assert found == {place: part for place, part in parts.items() if part is not None}
        assert sum(
            math.prod(s.stop - s.start for s in part) for part in found.values()
        ) == math.prod(sizes)


LARGE: dict[str, tuple[Shape, dict, dict]] = {
    "rows": ((3000, 1000), dict(zero=4096), dict(zero=3000)),
    "long rows": ((8, 600_000), dict(zero=4096), dict(zero=3000)),
    "a vector": ((50_000,), dict(zero=4096), dict(zero=3000)),
    "experts": ((4, 1000, 700), dict(zero=4096), dict(zero=3000)),
    "columns": ((4096, 4096), dict(zero=500, tensor=8, dim=1), dict(zero=700, tensor=2, dim=1)),
    "columns to rows": ((4096, 4096), dict(zero=500, tensor=8, dim=1), dict(zero=4000)),
}


@pytest.mark.parametrize("shape, stored, wanted", LARGE.values(), ids=LARGE)
def test_thousands_of_rectangles_are_compared_with_neighbours_only(
    shape: Shape, stored: dict, wanted: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-3 over thousands of ranks, read by as many: all with all are tens of millions, an entry."""
    counted = 0

    def counting(*rectangle_pair: Shape) -> tuple[slice, ...] | None:
        nonlocal counted
        counted += 1
        return shared(*rectangle_pair)

    entry, readers = entry_of(shape, cut(shape, **stored)), cut(shape, **wanted)
    assert len(entry.rectangles) > 3500 and len(readers) > 2500
    monkeypatch.setattr(rectangles, "shared", counting)
    check_filled("a", shape, [(r.offsets, r.sizes) for r in entry.rectangles])
    assert counted < 32 * len(entry.rectangles)
    counted = 0
    meetings = sum(1 for reader in readers for _ in entry.meeting(*reader))
    assert meetings >= len(readers)
    assert counted < 4 * (meetings + len(readers))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ([((0, 0), (3, 5)), ((2, 0), (1, 5))], "overlap at"),
        ([((0, 0), (4, 3)), ((0, 2), (4, 2))], "overlap at"),
        ([((0, 0), (4, 2)), ((0, 2), (4, 2))], "a hole"),
        ([((0, 1), (4, 5))], "over the edge"),
    ],
)
def test_parts_that_do_not_tile_are_refused(wrong: list, message: str) -> None:
    """Overlaps of rows and of columns; a hole; an edge."""
    with pytest.raises(CheckpointError, match=message):
        check_filled("a", (4, 5), wrong)
