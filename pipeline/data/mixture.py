"""Which dataset each sample comes from: a pure function of the weights and the sample number.

    weights --quantise--> slots of a period --spread--> table
            --Segment--> (dataset, its own sample number k)

A table of PERIOD slots is filled so that after any number of samples each dataset is within one
sample of its share. A change of weights (a schedule, an edit on resume, a dataset that is used up)
starts a new Segment, which remembers how many samples of each dataset were consumed before it:
nothing is read twice before its epoch ends. A Position is the loader's whole state;
`Mixture.advance` is the only thing that moves it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataUsedUp

Ints = npt.NDArray[np.int64]

PERIOD = 1 << 14  # weights are rounded to multiples of 1 / 16,384


def quantise(weights: Sequence[float]) -> tuple[int, ...]:
    """Slots of the period for each weight, PERIOD in all; a positive weight gets at least one.

    Largest remainders (Hamilton's method): no dataset is further than one slot from its exact
    share, except that tiny positive weights are raised to one slot.
    """
    share = np.asarray(weights, dtype=np.float64)
    share = share / share.sum() * PERIOD
    # Round down, then give the slots that are missing to those furthest below their share; fewer
    # are missing than there are datasets, so one turn of the loop is enough.
    slots = np.where(share > 0, np.maximum(np.floor(share), 1), 0).astype(np.int64)
    while (missing := PERIOD - int(slots.sum())) > 0:
        slots[np.argsort(slots - share, kind="stable")[:missing]] += 1
    while slots.sum() > PERIOD:  # many tiny weights were raised: the largest surplus gives back
        slots[np.argmax(np.where(slots > 1, slots - share, -np.inf))] -= 1
    return tuple(int(s) for s in slots)


@lru_cache(maxsize=8)
def spread(slots: tuple[int, ...]) -> tuple[Ints, Ints]:
    """(dataset of each slot, that dataset's slots before it), both (PERIOD,).

    The j-th slot of a dataset with c slots may lie in [floor(j P / c), ceil((j + 1) P / c)): then
    its count is within one of its share everywhere. Earliest deadline first meets all of these
    windows on one processor (Baruah et al. 1996, Proportionate progress, Algorithmica 15).
    """
    # A heap of slots not yet released, by release, and one of those that are, by deadline.
    source = np.empty(PERIOD, dtype=np.int64)
    nth = np.empty(PERIOD, dtype=np.int64)
    # (release, deadline, dataset, j)
    waiting = [(0, -(-PERIOD // c), s, 0) for s, c in enumerate(slots) if c]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    for slot in range(PERIOD):
        while waiting and waiting[0][0] <= slot:
            _, deadline, s, j = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline, s, j))
        deadline, s, j = heapq.heappop(ready)
        assert deadline > slot
        source[slot], nth[slot] = s, j
        c, j = slots[s], j + 1
        if j < c:
            heapq.heappush(waiting, (j * PERIOD // c, -(-(j + 1) * PERIOD // c), s, j))
    return source, nth


@dataclass(frozen=True)
class Segment:
    """A stretch of samples with one blend."""

    start: int
    """Global number of its first sample."""
    weights: tuple[float, ...]
    """The blend that was asked for, one weight a dataset."""
    slots: tuple[int, ...]
    """Slots of the period; 0 for a dataset that is used up."""
    consumed: tuple[int, ...]
    """Samples of each dataset consumed before this segment."""

    def locate(self, samples: Ints) -> tuple[Ints, Ints]:
        """(dataset, its own sample number k) of global sample numbers (n,) at or after start."""
        source, nth = spread(self.slots)
        period, slot = np.divmod(samples - self.start, PERIOD)
        s = source[slot]
        return s, np.asarray(self.consumed)[s] + period * np.asarray(self.slots)[s] + nth[slot]

    def consumed_at(self, sample: int) -> tuple[int, ...]:
        """Samples of each dataset consumed before global sample number `sample`."""
        period, slot = divmod(sample - self.start, PERIOD)
        within = np.bincount(spread(self.slots)[0][:slot], minlength=len(self.slots))
        return tuple(c + period * n + int(w) for c, n, w in zip(self.consumed, self.slots, within))

    def end(self, limits: Sequence[int | None]) -> int | None:
        """Global number of the first sample that would exceed a dataset's limit, or None."""
        ends = []
        for s, (limit, count) in enumerate(zip(limits, self.slots)):
            if limit is not None and count:
                # What is left is `period` whole periods and nth slots more: the dataset's slot
                # number nth (from 0) of the period after those is the first too many.
                period, nth = divmod(max(limit - self.consumed[s], 0), count)
                ends.append(
                    self.start
                    + period * PERIOD
                    + int(np.flatnonzero(spread(self.slots)[0] == s)[nth])
                )
        return min(ends, default=None)


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data; this is all the state there is."""

    step: int
    samples_seen: int
    segments: tuple[Segment, ...]
    """All blends so far; the last one is in force."""

    @property
    def ledger(self) -> tuple[int, ...]:
        """Samples of each dataset consumed so far."""
        return self.segments[-1].consumed_at(self.samples_seen)


@dataclass(frozen=True)
class Samples:
    """Some samples of a step; arrays of equal length."""

    number: Ints
    """Global sample number."""
    source: Ints
    """Index of the dataset."""
    index: Ints
    """The dataset's own sample number (see order.Order)."""

    def __getitem__(self, place: slice | Ints) -> Samples:
        """The samples at these places."""
        return Samples(self.number[place], self.source[place], self.index[place])


@dataclass(frozen=True)
class Mixture:
    """Datasets with weights that may change at given steps, and limits.

    Blends are found when samples are asked for, not planned ahead: where a segment ends depends on
    the batch of every step before it, which a ramp may change, and on weights edited at a resume.
    """

    names: tuple[str, ...]
    stages: tuple[tuple[int, tuple[float, ...]], ...]
    """(first step, weights) in order; the first stage begins at step 0."""
    limits: tuple[int | None, ...]
    """Largest number of samples of each dataset (max_epochs); None: no limit."""

    def weights_at(self, step: int) -> tuple[float, ...]:
        """The blend asked for at a step."""
        return [weights for start, weights in self.stages if start <= step][-1]

    def begin(
        self, *, step: int = 0, samples_seen: int = 0, consumed: tuple[int, ...] | None = None
    ) -> Position:
        """One segment that begins here, after `consumed` samples of each dataset (default 0)."""
        consumed = consumed or (0,) * len(self.names)
        return Position(
            step, samples_seen, (self._segment(samples_seen, self.weights_at(step), consumed),)
        )

    def advance(self, position: Position, num_samples: int) -> tuple[Samples, Position]:
        """The samples of the step at `position`, and the position after it.

        Raises:
            DataUsedUp: every dataset of the blend has reached its max_epochs.
        """
        spans, position = self._spans(position, num_samples)
        number = np.arange(spans[0][1], spans[-1][2])
        columns = [segment.locate(np.arange(start, stop)) for segment, start, stop in spans]
        source, k = (np.concatenate(column) for column in zip(*columns))
        return Samples(number, source, k), replace(position, step=position.step + 1)

    def skip(self, position: Position, num_samples: int) -> Position:
        """The position num_samples further on, the step unchanged; O(1)."""
        return self._spans(position, num_samples)[1] if num_samples else position

    def _spans(
        self, position: Position, num_samples: int
    ) -> tuple[list[tuple[Segment, int, int]], Position]:
        """Stretches (segment, first sample, end) of the next num_samples; the position after."""
        weights = self.weights_at(position.step)
        if weights != position.segments[-1].weights:
            position = self.change(position, weights)
        stop, spans = position.samples_seen + num_samples, []
        # A step may cross the end of a dataset, then it has a stretch before and one after it.
        while position.samples_seen < stop:
            segment, sample = position.segments[-1], position.samples_seen
            end = segment.end(self.limits)
            if end == sample:  # a dataset is used up: the others go on in the same proportions
                position = self.change(position, weights)
                continue
            upto = stop if end is None else min(end, stop)
            spans.append((segment, sample, upto))
            position = replace(position, samples_seen=upto)
        return spans, position

    def change(self, position: Position, weights: tuple[float, ...]) -> Position:
        """The same place with a new blend from here on; a segment without samples is replaced."""
        segment = self._segment(position.samples_seen, weights, position.ledger)
        kept = (
            position.segments[:-1]
            if position.segments[-1].start == segment.start
            else position.segments
        )
        return replace(position, segments=(*kept, segment))

    def _segment(
        self, start: int, weights: tuple[float, ...], consumed: tuple[int, ...]
    ) -> Segment:
        """A blend from `start` on, over the datasets that have not reached their limit."""
        live = [
            0.0 if limit is not None and count >= limit else weight
            for weight, count, limit in zip(weights, consumed, self.limits)
        ]
        if not any(live):
            used = ", ".join(
                f"{name} ({count:,} samples)" for name, count in zip(self.names, consumed)
            )
            raise DataUsedUp(
                f"the training data is used up at sample {start:,}: {used} reached "
                "data.train[].max_epochs. "
                "Raise max_epochs, add a dataset, or shorten the run (training.total_steps)."
            )
        return Segment(start, weights, quantise(live), consumed)


def cut(samples: Samples, lane: Ints, *, data_rank: int, data_parallel_size: int) -> Samples:
    """The equal share of a step's samples that one data-parallel rank reads.

    Sorted by lane first, so that a rank keeps its lanes from step to step and a remote shard stays
    on one node. Which rank reads a sample changes speed only: the step's gradient is a sum over all
    of them.
    """
    mine = np.argsort(lane, kind="stable")
    size = len(mine) // data_parallel_size
    return samples[np.sort(mine[data_rank * size : (data_rank + 1) * size])]
