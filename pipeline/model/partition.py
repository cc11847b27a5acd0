"""Which rectangles of a whole parameter one tensor-parallel rank holds; pure arithmetic, no torch.

    local shape, partition_dim, partition_stride, rank, size
    --Partition.of--> [(local slices, global slices), ...]

The global shape is the layout-free one: what checkpoints, initial weights and exports are written
in. It has no vocabulary padding; local rows without a place in it (padding) are in no piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

EXPERTS = "experts"
"""What DeepSpeed calls the parameters that data-parallel ranks hold different ones of."""
Slices = tuple[slice, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Partition:
    """One rank's share of a parameter.

    A split dimension is cut into `stride` equal runs and each run into `tensor_size` equal pieces;
    rank r holds the r-th piece of every run, one after another. Gated fc1 has stride 2 (global rows
    [gate; up], local rows [gate_r; up_r]), everything else 1. This is megatron-core's partition_dim
    and partition_stride.
    """

    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    dim: int | None
    """Split dimension; None: every tensor-parallel rank holds the whole parameter."""
    stride: int
    tensor_rank: int
    tensor_size: int

    @classmethod
    def of(
        cls,
        local_shape: Sequence[int],
        *,
        dim: int | None = None,
        stride: int = 1,
        tensor_rank: int = 0,
        tensor_size: int = 1,
        real_size: int | None = None,
    ) -> Partition:
        """The share of `tensor_rank`.

        Args:
            local_shape: shape of the rank's tensor, padding included.
            dim: the split dimension; None when the parameter is not split.
            real_size: rows of the whole parameter along `dim` without padding (vocabulary); None:
                nothing is padding.

        Raises:
            ValueError: the sizes contradict each other.
        """
        shape = list(local_shape)
        if dim is None:
            if real_size is not None:
                raise ValueError(f"real_size={real_size} needs the dimension that is padded")
            return cls(tuple(shape), tuple(shape), None, 1, tensor_rank, tensor_size)
        if shape[dim] % stride:
            raise ValueError(
                f"dimension {dim} of {tuple(shape)} is not a multiple of stride {stride}"
            )
        padded = shape[dim] * tensor_size
        if real_size is not None and not (stride == 1 and 0 < real_size <= padded):
            raise ValueError(
                f"{real_size} real rows need stride 1 (not {stride}) and at most {padded} rows"
            )
        shape[dim] = padded if real_size is None else real_size
        return cls(tuple(shape), tuple(local_shape), dim, stride, tensor_rank, tensor_size)

    @property
    def is_split(self) -> bool:
        """Whether other tensor-parallel ranks hold other parts of the parameter."""
        return self.dim is not None and self.tensor_size > 1

    def pieces(self) -> list[tuple[Slices, Slices]]:
        """[(slices of the local tensor, slices of the whole)]: equal rectangles, in local order."""
        if self.dim is None:
            whole = tuple(slice(0, n) for n in self.global_shape)
            return [(whole, whole)]
        real = self.global_shape[self.dim]
        if self.tensor_size == 1:
            return [(self._rows(0, real), self._rows(0, real))]
        width = self.local_shape[self.dim] // self.stride
        found = []
        for run in range(self.stride):
            # Run 1 (up) of 2, rank 1 of 2, width 2: rows (1 * 2 + 1) * 2 = 6 and 7 of the whole 8.
            # Rows from `real` on are padding, which the last ranks may have nothing else of.
            start = (run * self.tensor_size + self.tensor_rank) * width
            stop = min(start + width, real)
            if start < stop:
                found.append(
                    (self._rows(run * width, run * width + stop - start), self._rows(start, stop))
                )
        return found

    def rectangles(
        self, start: int, stop: int, *, largest: int
    ) -> Iterator[tuple[int, Shape, Shape]]:
        """(first element, shape, offsets in the whole) of rectangles that tile a local run.

        ZeRO cuts the flattened local tensor anywhere. A run of a matrix is at most a part of a row,
        whole rows, and a part of a row, and each of these is contiguous in memory.

        Args:
            start, stop: the run, elements of the row-major local tensor; first elements are counted
                from 0, not start.
            largest: elements of a rectangle, rounded up to one row.
        """
        for first, shape, offsets in _tiles(self.local_shape, start, stop, largest):
            if self.dim is None:
                yield first, shape, offsets
                continue
            # A tile may lie in both runs of a gated fc1, or reach into padding rows: its part in
            # each piece is a rectangle of the whole parameter, at the place of that piece.
            for held, whole in self.pieces():
                low = max(offsets[self.dim], held[self.dim].start)
                high = min(offsets[self.dim] + shape[self.dim], held[self.dim].stop)
                if low >= high:
                    continue
                cut, place = list(shape), list(offsets)
                cut[self.dim] = high - low
                place[self.dim] = low - held[self.dim].start + whole[self.dim].start
                assert self.dim == 0 or cut[self.dim] == shape[self.dim], (
                    "columns are split without stride or padding"
                )
                step = _product(self.local_shape[self.dim + 1 :])
                yield first + (low - offsets[self.dim]) * step, tuple(cut), tuple(place)

    def _rows(self, start: int, stop: int) -> Slices:
        return tuple(
            slice(start, stop) if i == self.dim else slice(0, n)
            for i, n in enumerate(self.global_shape)
        )


def is_split(parameter: Any) -> bool:
    """Whether tensor-parallel ranks hold different parts of the parameter.

    DeepSpeed and megatron-core also set the attribute, to False, on parameters that are whole.
    """
    return getattr(parameter, "tensor_model_parallel", False)


def mark_split(parameter: Any, dim: int, stride: int) -> None:
    """Say that tensor-parallel ranks hold parts of the parameter; None is no parameter."""
    if parameter is not None:
        vars(parameter).update(
            tensor_model_parallel=True, partition_dim=dim, partition_stride=stride
        )


def mark_expert(parameter: Any, *, spans_data: bool) -> None:
    """Say that the parameter belongs to an expert that this rank holds whole, and not all ranks.

    Args:
        spans_data: data-parallel ranks hold different ones too. `allreduce` and `group_name` are
            DeepSpeed's words for that (engine/deepspeed/experts.py).
    """
    vars(parameter).update(
        is_expert=True,
        tensor_model_parallel=False,
        allreduce=not spans_data,
        group_name=EXPERTS,
    )


def is_expert(parameter: Any) -> bool:
    """Whether expert-parallel ranks hold different experts, this parameter's among them."""
    return getattr(parameter, "is_expert", False)


def spans_data(parameter: Any) -> bool:
    """Whether data-parallel ranks hold other experts, so that it is reduced among fewer ranks."""
    return is_expert(parameter) and not parameter.allreduce


def is_shared(parameter: Any) -> bool:
    """Whether all tensor-parallel ranks hold the same numbers, of which one of them speaks."""
    return not (is_split(parameter) or is_expert(parameter))


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _tiles(shape: Shape, start: int, stop: int, largest: int) -> Iterator[tuple[int, Shape, Shape]]:
    """(first element, shape, offsets) of rectangles that tile a run of a vector or matrix."""
    if len(shape) == 1:
        for first in range(start, stop, largest):
            yield first, (min(largest, stop - first),), (first,)
        return
    # Elements 3 to 17 of rows of 5 are (1, 2), (2, 5), (1, 2): the rest of row 0, two whole rows,
    # the beginning of row 3.
    (_, width), first = shape, start
    while first < stop:
        row, column = divmod(first, width)
        if column or stop - first < width:
            tile = (1, min(width - column, stop - first))
        else:
            tile = (min((stop - first) // width, max(1, largest // width)), width)
        yield first, tile, (row, column)
        first += tile[0] * tile[1]
