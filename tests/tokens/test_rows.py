"""Rows hold whole dialogues, each where it first fits among the last 64 rows."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.tokens.rows import OPEN_ROWS, Dialogue, RowPacker
from pipeline.data.shard_format import ShardLayout

SIZE, EOD = 32, 0


def pack(lengths):
    """(rows, places): rows as (tokens, starts, loss); dialogue n is n + 1, over and over."""
    rows = []
    packer = RowPacker(
        ShardLayout(np.dtype("<u2"), SIZE),
        eod=EOD,
        write=lambda *row: rows.append(row[:5]),
    )  # fmt: skip
    for number, length in enumerate(lengths):
        loss = np.zeros(length, np.uint8)
        loss[-1] = 1
        packer.add(Dialogue(np.full(length, number + 1), loss, f"d{number}", length))
    packer.close()
    return rows, packer.places


def first_fit(lengths):
    """The same by the book: rows of dialogue numbers."""
    rows, room = [], []
    for number, length in enumerate(lengths):
        for row in range(max(0, len(rows) - OPEN_ROWS), len(rows)):
            if room[row] >= length:
                rows[row].append(number)
                room[row] -= length
                break
        else:
            rows.append([number])
            room.append(SIZE - length)
    return rows


@given(lengths=st.lists(st.integers(1, SIZE), max_size=400))
@settings(deadline=None, max_examples=30)
def test_dialogues_lie_whole_where_they_first_fit(lengths):
    rows, places = pack(lengths)
    expected = first_fit(lengths)
    assert len(rows) == len(expected)
    written = []
    for (tokens, starts, names, size, loss), members in zip(rows, expected, strict=True):
        ends = np.cumsum([lengths[n] for n in members])
        whole = np.concatenate([np.full(lengths[n], n + 1) for n in members])
        assert tokens.tolist() == [*whole.tolist(), *[EOD] * (SIZE - len(whole))]
        assert starts.tolist() == [0, *ends[: None if ends[-1] < SIZE else -1].tolist()]
        assert np.flatnonzero(loss).tolist() == (ends - 1).tolist()
        assert names[: len(members)] == [f"d{n}" for n in members]
        assert size == len(whole)
        written += [*members, *([None] if ends[-1] < SIZE else [])]
    assert [written.index(n) for n in range(len(lengths))] == places


def test_only_the_last_rows_are_open():
    """Memory, and the time of one dialogue, do not grow with a unit."""
    rows, _ = pack([SIZE - 1] * (OPEN_ROWS + 1) + [1])
    assert [len(names) for _, _, names, _, _ in rows[:3]] == [2, 2, 2]
    assert rows[0][1].tolist() == [0, SIZE - 1] and rows[0][2] == [
        "d0",
        "d0",
    ]  # padded: it was closed
    assert rows[1][2] == ["d1", f"d{OPEN_ROWS + 1}"]
