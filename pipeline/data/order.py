"""The order of one dataset's sequences: sample number to (shard, sequence), O(1) anywhere.

    k --divmod epoch_size--> epoch, r --interleave--> lane, t --window, Feistel--> shard, sequence

Every epoch reads each sequence exactly once. Per epoch the shards are permuted and dealt to `lanes`
like cards; a lane is cut into windows of `window` consecutive shards; inside a window a keyed
Feistel permutation shuffles all sequences. Position r visits the lanes in turn (a lane that is used
up drops out, so nothing is lost when lanes are uneven). Lanes bound traffic: while ranks own whole
lanes, a shard is read on one node only, and `window` shards of a lane are live at a time. Nothing
here depends on ranks, workers or restarts, and nothing is stored but a few numbers a shard.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

ROUNDS = 6  # even, so that the two unequal halves of an odd width come back to their places
# Smaller Feistel domains mix poorly; walking a 64-element cycle for a tiny one costs microseconds
MIN_BITS = 6


def num_sequences(tokens: Any, seq_len: int, *, packed: bool = False) -> Ints:
    """Sequences of each shard: one reads seq_len + 1 tokens, and neighbours share one token.

    Packed rows share none: the label after a row's last token is of another document.
    """
    if packed:
        return np.asarray(tokens, dtype=np.int64) // seq_len
    return np.maximum((np.asarray(tokens, dtype=np.int64) - 1) // seq_len, 0)


def num_windows(tokens: Any, seq_len: int, *, packed: bool = False) -> Ints:
    """Windows of each shard that together hold all of its labels, the last one perhaps short.

    A shard of n tokens has n - 1 labels, so the count of text rounds up; packed rows are whole.
    """
    labels = np.asarray(tokens, dtype=np.int64) - (0 if packed else 1)
    return -(-np.maximum(labels, 0) // seq_len)


def draw_keys(*tag: int) -> Words:
    """(ROUNDS,) round keys for a tuple of integers; equal on every machine and version."""
    # The text of the numbers, as their bytes would depend on the machine's word and byte order; all
    # keys from one digest, 48 of the 64 bytes that blake2b can give.
    digest = hashlib.blake2b(
        repr(tuple(int(t) for t in tag)).encode(), digest_size=8 * ROUNDS
    ).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def permute(index: Any, size: Any, keys: Words) -> Ints:
    """A keyed permutation of range(size), applied to each index.

    A Feistel network on the next power of two, walked along its cycle until the value falls below
    size again: the walk starts inside, so it ends inside, and the map stays a bijection. At most 2
        steps on average from size 33 up.

    Args:
        index: (n,) integers in [0, size).
        size: scalar, or (n,): each element in a permutation of its own.
        keys: (ROUNDS, n) or (ROUNDS, 1) from draw_keys.
    """
    index = np.asarray(index, dtype=np.uint64)
    size = np.broadcast_to(np.asarray(size, dtype=np.uint64), index.shape)
    keys = np.broadcast_to(keys, (ROUNDS, *index.shape))
    result = np.zeros(index.shape, dtype=np.uint64)
    # The narrowest word that holds size - 1: fewer than 2 * size values, so that on average fewer
    # than 2 passes find one below size. Words of an even width only, with two equal halves, would
    # hold up to 4 * size and take up to 4.
    bits = np.maximum(np.frexp(np.maximum(size, 1).astype(np.float64) - 1)[1], MIN_BITS).astype(
        np.uint64
    )
    todo = np.flatnonzero(size > 1)
    value = index[todo]
    while todo.size:
        value = _feistel(value, bits[todo], keys[:, todo])
        inside = value < size[todo]
        result[todo[inside]] = value[inside]
        todo, value = todo[~inside], value[~inside]
    return result.astype(np.int64)


def _feistel(value: Words, bits: Words, keys: Words) -> Words:
    """One pass over ROUNDS rounds on `bits`-wide words; unsigned arithmetic wraps by design."""
    # Each round XORs one half with a hash of the other, which the inverse can compute again: a
    # bijection for any hash. Splitmix64 takes every bit of key and half to every bit of the result.
    one = np.uint64(1)
    right_bits = bits >> one
    left_bits = bits - right_bits
    left, right = value >> right_bits, value & ((one << right_bits) - one)
    for key in keys:
        mixed = right * np.uint64(0x9E3779B97F4A7C15) + key  # splitmix64's constants and finaliser
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        left, right = right, left ^ (mixed & ((one << left_bits) - one))
        left_bits, right_bits = right_bits, left_bits
    joined: Words = (left << right_bits) | right
    return joined


@dataclass(frozen=True)
class _Epoch:
    """One epoch's deal; arrays over its permuted shards, lane after lane."""

    number: int
    shards: Ints  # (num_shards,) shard numbers, grouped by lane
    first: Ints  # (num_shards + 1,) sequences before each of them
    lane_start: Ints  # (lanes + 1,) where each lane begins in `shards`
    by_length: Ints  # (lanes,) lanes from the shortest to the longest
    phase_round: Ints  # (lanes,) round in which phase p begins: the p shortest lanes are used up
    phase_first: Ints  # (lanes,) position in the epoch at which phase p begins


class Order:
    """Sample number k of one dataset, over all epochs, to (shard, sequence)."""

    def __init__(
        self,
        shard_tokens: Any,
        *,
        seq_len: int,
        seed: int,
        lanes: int = 1,
        window: int = 64,
        packed: bool = False,
    ) -> None:
        """Prepare for shards of shard_tokens (num_shards,) tokens; the rest is the whole state."""
        self.seq_len, self.seed, self.lanes, self.window = seq_len, seed, lanes, window
        self.sequences = num_sequences(shard_tokens, seq_len, packed=packed)
        self.epoch_size = int(self.sequences.sum())
        self._epoch = lru_cache(maxsize=2)(self._deal)

    def __call__(self, k: Any) -> tuple[Ints, Ints]:
        """(shard, sequence) of sample numbers k (n,) in any order; epoch_size must not be 0."""
        epochs, position = np.divmod(np.asarray(k, dtype=np.int64), self.epoch_size)
        shard, sequence = np.empty_like(epochs), np.empty_like(epochs)
        for number in np.unique(epochs):
            epoch, at = self._epoch(int(number)), np.flatnonzero(epochs == number)
            lane, turn = self._interleave(epoch, position[at])
            shard[at], sequence[at] = self._shuffle(epoch, lane, turn)
        return shard, sequence

    def lane(self, k: Any) -> Ints:
        """The lane each sample number belongs to."""
        numbers: Ints = np.asarray(k, dtype=np.int64)
        lane = np.zeros_like(numbers)
        if self.lanes > 1:
            epochs, position = np.divmod(numbers, self.epoch_size)
            for number in np.unique(epochs):
                at = np.flatnonzero(epochs == number)
                lane[at] = self._interleave(self._epoch(int(number)), position[at])[0]
        return lane

    def _turns(self, epoch: _Epoch, lanes: Ints, position: int) -> Ints:
        """How many sequences of each lane the epoch has read at `position`, as a turn it has."""
        phase = int(np.searchsorted(epoch.phase_first, position, "right")) - 1
        rounds = epoch.phase_round[phase] + (position - epoch.phase_first[phase]) // (
            self.lanes - phase
        )
        lengths = np.diff(epoch.first[epoch.lane_start])[lanes]
        turns: Ints = np.clip(rounds, 0, np.maximum(lengths - 1, 0))
        return turns

    def upcoming_shards(self, k: Any) -> list[int]:
        """Shards worth fetching around samples k: the windows they lie in, then those after."""
        number, last = divmod(int(np.max(k)), self.epoch_size)
        # Samples of one step can lie on both sides of a window's end.
        oldest = max(int(np.min(k)) - number * self.epoch_size, 0)
        lanes = np.unique(self.lane(k))
        epoch = self._epoch(number)
        start, _ = self._window(epoch, lanes, self._turns(epoch, lanes, oldest))
        _, stop = self._window(epoch, lanes, self._turns(epoch, lanes, last))
        end = epoch.lane_start[lanes + 1]
        spans = [(epoch, start, stop), (epoch, stop, np.minimum(stop + self.window, end))]
        if np.any(stop == end):  # the next window is the first one of the next epoch
            following, lanes = self._epoch(number + 1), lanes[stop == end]
            start = following.lane_start[lanes]
            spans.append(
                (following, start, np.minimum(start + self.window, following.lane_start[lanes + 1]))
            )
        found = [
            int(s)
            for deal, starts, stops in spans
            for a, b in zip(starts, stops)
            for s in deal.shards[a:b]
        ]
        return list(dict.fromkeys(found))

    def _deal(self, number: int) -> _Epoch:
        """Epoch `number`: its permuted shards by lane, and when each lane is used up.

        Lanes of 2, 3 and 3 sequences: phase 0 is rounds 0 and 1 with three lanes, positions 0 to 5;
        phase 1 is round 2 with two lanes, positions 6 and 7. Phase 2 begins at 8 and is empty.
        """
        count, lanes = len(self.sequences), self.lanes
        drawn = permute(np.arange(count), count, draw_keys(self.seed, 0, number)[:, None])
        shards = np.concatenate([drawn[lane::lanes] for lane in range(lanes)])
        sizes = (count - np.arange(lanes) + lanes - 1) // lanes
        lane_start = np.concatenate([[0], np.cumsum(np.maximum(sizes, 0))])
        first = np.concatenate([[0], np.cumsum(self.sequences[shards])])
        length = np.diff(first[lane_start])
        by_length = np.argsort(length, kind="stable")
        # Phase p lasts from the round where p lanes are used up to the round where p + 1 are; lanes
        # - p take part.
        phase_round = np.concatenate([[0], length[by_length][:-1]])
        rounds = np.diff(np.append(phase_round, length[by_length][-1]))
        phase_first = np.concatenate([[0], np.cumsum(rounds * (lanes - np.arange(lanes)))[:-1]])
        return _Epoch(number, shards, first, lane_start, by_length, phase_round, phase_first)

    def _interleave(self, epoch: _Epoch, position: Ints) -> tuple[Ints, Ints]:
        """(lane, turn in it) of positions in the epoch; lanes with sequences left take turns."""
        phase = np.searchsorted(epoch.phase_first, position, "right") - 1
        turn, nth = np.divmod(position - epoch.phase_first[phase], self.lanes - phase)
        return epoch.by_length[phase + nth], epoch.phase_round[phase] + turn

    def _window(self, epoch: _Epoch, lane: Ints, turn: Ints) -> tuple[Ints, Ints]:
        """[start, stop) in epoch.shards of the windows that hold these turns of these lanes."""
        lane_first = epoch.lane_start[lane]
        place = np.searchsorted(epoch.first, epoch.first[lane_first] + turn, "right") - 1
        start = place - (place - lane_first) % self.window
        return start, np.minimum(start + self.window, epoch.lane_start[lane + 1])

    def _shuffle(self, epoch: _Epoch, lane: Ints, turn: Ints) -> tuple[Ints, Ints]:
        """(shard, sequence): the turn, permuted inside its window."""
        start, stop = self._window(epoch, lane, turn)
        # Keys by window, not by sample: a step's samples lie in one or two windows of a lane.
        windows, which = np.unique(start, return_inverse=True)
        keys = np.stack([draw_keys(self.seed, 1, epoch.number, int(w)) for w in windows], axis=1)[
            :, which
        ]
        base = epoch.first[start]
        place = epoch.first[epoch.lane_start[lane]] + turn - base
        drawn = base + permute(place, epoch.first[stop] - base, keys)
        at = np.searchsorted(epoch.first, drawn, "right") - 1
        return epoch.shards[at], drawn - epoch.first[at]
