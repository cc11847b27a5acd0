"""One rank for each matrix: where it is put together, worked on whole, and taken apart again.

    runs of matrices, on many ranks --HomeRanks.map(function)--> the same runs of function(matrix)

However the ranks share a matrix, by tensor parallelism, by ZeRO or both, each says once which runs
of it are its own; after that sizes are known, and a `map` is two all-to-alls with one call of the
function for each matrix between them. A rank sends what it holds once and gets it back: work that
needs whole matrices costs the group what it costs one process, and no rank holds more of them at a
time than the ones it is home to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.distributed.layout import Axis
from pipeline.model.partition import Partition, Slices


@dataclass(frozen=True)
class Run:
    """A run of a matrix that lies in a flat tensor of this rank."""

    name: str
    """Canonical, of the matrix."""
    partition: Partition
    start: int
    """First element, counted in the row-major tensor of this tensor-parallel rank."""
    numel: int
    flat: int
    """Number of the flat tensor, the same on all ranks."""
    offset: int
    """First element in it."""

    def tiles(self) -> Iterator[tuple[slice, tuple[int, ...], Slices]]:
        """(elements of the run, their shape, their place in the whole matrix)."""
        stop = self.start + self.numel
        for first, shape, offsets in self.partition.rectangles(
            self.start, stop, largest=max(1, self.numel)
        ):
            at = first - self.start
            place = tuple(slice(o, o + size) for o, size in zip(offsets, shape))
            yield slice(at, at + math.prod(shape)), shape, place


class HomeRanks:
    """Who is home to which matrix, the same answer on all ranks."""

    def __init__(
        self, runs: Iterable[Run], peers: Axis, *, cost: Callable[[str, tuple[int, ...]], float]
    ) -> None:
        """Tell the peers which runs are here. Collective: call on every rank of `peers`.

        Args:
            runs: of this rank; several ranks may hold the same run.
            peers: ranks that together hold every matrix whole.
            cost: of the work on a matrix, from its name and whole shape.
        """
        self._peers = peers
        self._runs = [_by_name(runs) for runs in gather(list(runs), peers)]
        shapes: dict[str, tuple[int, ...]] = {}
        numbers: dict[str, int] = {}
        for held in self._runs:
            for name, parts in held.items():
                shapes[name], numbers[name] = parts[0].partition.global_shape, parts[0].flat
        self._shapes, self._flat_of = shapes, numbers
        self.home = _least_loaded({n: cost(n, shape) for n, shape in shapes.items()}, peers.size)

    def map(
        self, function: Callable[[str, Tensor], Tensor], flats: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        """`function` of every matrix that lies in these flat tensors, in flat tensors like them.

        Elements of no run are 0. Collective: every rank of the peers gives the same numbers.

        Args:
            function: (name, whole matrix) to one of the same shape.
            flats: number to flat tensor, all of one type.
        """
        here = self._peers.rank
        names = sorted(name for name, number in self._flat_of.items() if number in flats)
        sent = [self._runs_for(here, home, names) for home in range(self._peers.size)]
        taken = [self._runs_for(rank, here, names) for rank in range(self._peers.size)]
        like = next(iter(flats.values()))
        parts = [flats[r.flat][r.offset : r.offset + r.numel] for runs in sent for r in runs]
        received = self._swap(_joined(parts, like), sent, taken)
        wholes = {
            name: like.new_empty(self._shapes[name]) for name in names if self.home[name] == here
        }
        arrived = [run for runs in taken for run in runs]
        for run, part in zip(arrived, received.split([run.numel for run in arrived])):
            for elements, shape, place in run.tiles():
                wholes[run.name][place] = part[elements].view(shape)
        wholes = {name: function(name, whole) for name, whole in wholes.items()}
        parts = [
            wholes[run.name][place].flatten() for run in arrived for _, _, place in run.tiles()
        ]
        back = self._swap(_joined(parts, like), taken, sent)
        result = {number: torch.zeros_like(flat) for number, flat in flats.items()}
        mine = [run for runs in sent for run in runs]
        for run, part in zip(mine, back.split([run.numel for run in mine])):
            result[run.flat][run.offset : run.offset + run.numel] = part
        return result

    def _runs_for(self, rank: int, home: int, names: list[str]) -> list[Run]:
        """What `rank` sends to `home`, in the order of the message."""
        held = self._runs[rank]
        return [run for name in names if self.home[name] == home for run in held.get(name, ())]

    def _swap(self, message: Tensor, sent: list[list[Run]], taken: list[list[Run]]) -> Tensor:
        """What the peers send here for `message`, in the order of the ranks."""
        if self._peers.size == 1:
            return message
        sizes, incoming = ([sum(r.numel for r in runs) for runs in way] for way in (sent, taken))
        received = message.new_empty(sum(incoming))
        dist.all_to_all_single(received, message, incoming, sizes, group=self._peers.group)
        return received


def gather(runs: list[Run], peers: Axis) -> list[list[Run]]:
    """The runs of every peer. Collective."""
    if peers.size == 1:
        return [runs]
    everyone: list[list[Run]] = [[]] * peers.size
    dist.all_gather_object(everyone, runs, group=peers.group)
    return everyone


def _by_name(runs: list[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.name, []).append(run)
    return found


def _least_loaded(costs: dict[str, float], num_ranks: int) -> dict[str, int]:
    """Name to rank: the dearest first, each to the rank that has least to do until then."""
    loads, homes = [0.0] * num_ranks, {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        homes[name] = min(range(num_ranks), key=lambda rank: loads[rank])
        loads[homes[name]] += costs[name]
    return homes


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if parts else like.new_empty(0)
