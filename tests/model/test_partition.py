"""Partition: the pieces of all ranks tile the whole parameter, and agree with megatron-core's cutting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model.partition import Partition


@given(
    width=st.integers(1, 5),
    stride=st.integers(1, 3),
    size=st.integers(1, 4),
    dim=st.integers(0, 1),
    other=st.integers(1, 3),
)
def test_pieces_of_all_ranks_tile_the_whole_parameter_once(
    width: int, stride: int, size: int, dim: int, other: int
) -> None:
    """A hole or an overlap would be a lost or twice written weight."""
    local = [other, other]
    local[dim] = width * stride
    count = None
    for rank in range(size):
        part = Partition.of(local, dim=dim, stride=stride, tensor_rank=rank, tensor_size=size)
        count = np.zeros(part.global_shape, int) if count is None else count
        held = np.zeros(local, int)
        for local_slices, global_slices in part.pieces():
            assert held[local_slices].shape == count[global_slices].shape
            held[local_slices] += 1
            count[global_slices] += 1
        assert (held == 1).all()
    assert count is not None and (count == 1).all()


@given(rows=st.integers(1, 9), size=st.integers(1, 4), padding=st.integers(0, 8))
def test_padding_rows_are_in_no_piece(rows: int, size: int, padding: int) -> None:
    """A checkpoint holds the real vocabulary only, so that any tensor-parallel size can read it."""
    local = -(-(rows + padding) // size)
    seen = []
    for rank in range(size):
        part = Partition.of((local, 2), dim=0, tensor_rank=rank, tensor_size=size, real_size=rows)
        assert part.global_shape == (rows, 2)
        for held, whole in part.pieces():
            seen += range(whole[0].start, whole[0].stop)
            assert whole[0].start == rank * local + held[0].start
    assert seen == list(range(rows))


def test_gated_fc1_rank_holds_its_gate_then_its_up() -> None:
    """Worked by hand: 8 global rows, gate 0-3, up 4-7; rank 1 of 2 holds gate 2,3 and up 6,7."""
    part = Partition.of((4, 1), dim=0, stride=2, tensor_rank=1, tensor_size=2)
    rows = [
        (held[0].start, held[0].stop, whole[0].start, whole[0].stop)
        for held, whole in part.pieces()
    ]
    assert rows == [(0, 2, 2, 4), (2, 4, 6, 8)]
    assert part.is_split and part.global_shape == (8, 1)


def test_replicated_parameter_is_one_piece_on_every_rank() -> None:
    """Norms and row-parallel biases."""
    part = Partition.of((7,), tensor_rank=1, tensor_size=2)
    assert part.pieces() == [((slice(0, 7),), (slice(0, 7),))]
    assert not part.is_split


@pytest.mark.parametrize(
    "arguments",
    [
        {"dim": 0, "stride": 2},
        {"dim": 0, "real_size": 4},
        {"real_size": 2},
        {"dim": 0, "real_size": 0},
    ],
)
def test_contradicting_sizes_are_refused(arguments: dict) -> None:
    """Three rows: not a multiple of 2, not 4 real ones, and real rows need a dimension."""
    with pytest.raises(ValueError):
        Partition.of((3, 2), **arguments)


@given(
    width=st.integers(1, 4), stride=st.integers(1, 2), size=st.integers(1, 3), dim=st.sampled_from([None, 0, 1]),
    other=st.integers(1, 4), padding=st.integers(0, 2), cuts=st.lists(st.integers(0, 40), max_size=4),
    largest=st.integers(1, 9),
)  # fmt: skip
def test_runs_of_all_ranks_rebuild_the_whole_parameter(
    width: int,
    stride: int,
    size: int,
    dim: int | None,
    other: int,
    padding: int,
    cuts: list[int],
    largest: int,
) -> None:
    """ZeRO cuts the flattened local tensor anywhere; every element of the whole is in exactly one rectangle."""
    stride = stride if dim == 0 else 1
    shape = [other, other]
    if dim is not None:
        shape[dim] = width * stride
    real = width * size - padding if dim == 0 and stride == 1 and padding < width * size else None
    count = None
    for rank in range(size):
        part = Partition.of(
            shape, dim=dim, stride=stride, tensor_rank=rank, tensor_size=size, real_size=real
        )
        whole = np.arange(np.prod(part.global_shape)).reshape(part.global_shape)
        local = np.full(shape, -1)
        for held, place in part.pieces():
            local[held] = whole[place]
        count = np.zeros(part.global_shape, int) if count is None or dim is None else count
        edges = sorted({0, local.size, *(c for c in cuts if c < local.size)})
        for start, stop in zip(edges, edges[1:], strict=False):
            for first, rectangle, offsets in part.rectangles(start, stop, largest=largest):
                place = tuple(slice(o, o + n) for o, n in zip(offsets, rectangle, strict=True))
                assert start <= first and first + np.prod(rectangle) <= stop
                data = local.reshape(-1)[first : first + np.prod(rectangle)].reshape(rectangle)
                assert (data == whole[place]).all()
                count[place] += 1
        if dim is None:
            assert (count == 1).all()
    assert count is not None and (count == 1).all()
