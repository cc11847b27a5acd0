"""What a rank updates, as runs of parameters, and as rectangles of whole tensors.

    Fragment(name, partition, start, views) --chunks_of--> Chunk(entry, whole shape, offsets, view)

Entry names: weights/<parameter>, and <optimizer state>/<parameter>, such as
exp_avg/layers.0.mlp.linear_fc1.weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from pipeline.model.partition import Partition

WEIGHT = "weight"
# Largest rectangle: a reader that needs a part of one reads all of it, and each reading thread
# holds one.
CHUNK_ELEMENTS = 16 * 2**20


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter that this rank updates."""

    name: str
    partition: Partition
    start: int
    """First element, counted in the row-major tensor of this tensor-parallel rank."""
    views: dict[str, Tensor]
    """`weight` and, once the optimizer has stepped, its element-wise state: flat fp32, the
    optimizer's own memory.
    """
    is_owned: bool
    """Whether this rank writes it; false for copies that another rank writes too."""

    @property
    def numel(self) -> int:
        """Elements of the run."""
        return self.views[WEIGHT].numel()


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a whole tensor."""

    name: str
    whole_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: Tensor
    """The values, in the rectangle's shape."""


def entry_name(key: str, parameter: str) -> str:
    """Name in the checkpoint of a parameter's weight or of a part of its optimizer state."""
    return f"{'weights' if key == WEIGHT else key}/{parameter}"


def chunks_of(fragment: Fragment, keys: Iterable[str]) -> Iterator[Chunk]:
    """The fragment's memory as rectangles of whole tensors; views, padding rows left out."""
    partition, start = fragment.partition, fragment.start
    for first, shape, offsets in partition.rectangles(
        start, start + fragment.numel, largest=CHUNK_ELEMENTS
    ):
        for key in keys:
            view = fragment.views[key].narrow(0, first - start, math.prod(shape)).view(shape)
            yield Chunk(entry_name(key, fragment.name), partition.global_shape, offsets, view)
