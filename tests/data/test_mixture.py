"""The blend of datasets: exact shares in every prefix, changes that repeat nothing, cuts that lose nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.mixture import PERIOD, Mixture, Position, Samples, Segment, cut, quantise, spread
from pipeline.errors import DataError

weights = st.lists(st.just(0.0) | st.floats(1e-6, 1), min_size=1, max_size=12).filter(
    lambda w: sum(w) > 0.01
)


def mixture(
    *stages: tuple[int, tuple[float, ...]], limits: tuple[int | None, ...] | None = None
) -> Mixture:
    count = len(stages[0][1])
    return Mixture(tuple("abcdef"[:count]), stages, limits or (None,) * count)


def read(
    blend: Mixture, steps: int, size: int = 16, at: Position | None = None
) -> tuple[list[list[tuple[int, int]]], Position]:
    """Each step's (dataset, k) pairs and the position after them."""
    position, seen = at or blend.begin(), []
    for _ in range(steps):
        samples, position = blend.advance(position, size)
        seen.append(list(zip(samples.source.tolist(), samples.index.tolist())))
    return seen, position


@given(weights)
@settings(deadline=None, max_examples=40)
def test_quantised_weights_sum_to_the_period_and_lose_no_dataset(w):
    slots = np.array(quantise(w))
    assert slots.sum() == PERIOD
    assert ((slots > 0) == (np.array(w) > 0)).all()
    share = np.array(w) / sum(w) * PERIOD
    tiny = np.sum((share > 0) & (share < 1))
    assert np.abs(slots - share).max() <= 1 + tiny


@given(weights)
@settings(deadline=None, max_examples=25)
def test_every_prefix_is_within_one_sample_of_the_blend(w):
    slots = quantise(w)
    source, nth = spread(slots)
    length = np.arange(1, PERIOD + 1)
    for dataset, count in enumerate(slots):
        seen = np.cumsum(source == dataset)
        assert np.abs(seen - length * count / PERIOD).max() < 1
        assert nth[source == dataset].tolist() == list(range(count))


@given(weights, st.integers(0, 3 * PERIOD), st.integers(0, 10**9))
@settings(deadline=None, max_examples=25)
def test_locate_and_consumed_at_are_closed_forms_of_counting_through(w, sample, start):
    segment = Segment(start, tuple(w), quantise(w), tuple(range(len(w))))
    number = np.arange(start, start + 3 * PERIOD + 1)
    source, k = segment.locate(number)
    before = np.bincount(source[:sample], minlength=len(w)) + np.arange(len(w))
    assert segment.consumed_at(start + sample) == tuple(before.tolist())
    assert k[sample] == before[source[sample]]
    some = np.array([sample])
    assert [c.tolist() for c in segment.locate(start + some)] == [
        source[some].tolist(),
        k[some].tolist(),
    ]


def test_a_change_of_weights_goes_on_where_each_dataset_stood():
    blend = mixture((0, (0.7, 0.3)), (5, (0.2, 0.8)), (9, (0.0, 1.0)))
    steps, position = read(blend, 12, size=100)
    pairs = [pair for step in steps for pair in step]
    for dataset in (0, 1):
        ks = [k for source, k in pairs if source == dataset]
        assert ks == list(range(len(ks)))  # nothing repeated, nothing left out
    assert [sum(source == 0 for source, _ in step) for step in steps] == pytest.approx(
        [70] * 5 + [20] * 4 + [0] * 3, abs=2
    )
    assert [segment.start for segment in position.segments] == [0, 500, 900]
    assert sum(position.ledger) == position.samples_seen == 1200


def test_a_dataset_stops_at_its_limit_in_the_middle_of_a_step_and_the_others_keep_their_proportions():
    blend = mixture((0, (0.5, 0.25, 0.25)), limits=(40, None, None))
    steps, position = read(blend, 20, size=16)
    pairs = [pair for step in steps for pair in step]
    counts = [sum(source == dataset for source, _ in pairs) for dataset in range(3)]
    assert counts[0] == 40
    assert abs(counts[1] - counts[2]) <= 2
    assert len(position.segments) == 2
    assert position.segments[1].slots == (0, PERIOD // 2, PERIOD // 2)


def test_used_up_data_is_an_error_that_names_the_ways_out():
    blend = mixture((0, (0.5, 0.5)), limits=(40, 30))
    _, position = read(blend, 4, size=16)
    with pytest.raises(
        DataError, match=r"used up at sample 70: a \(40 samples\), b \(30 samples\).*max_epochs"
    ):
        read(blend, 1, size=16, at=position)


@given(weights, st.integers(1, 37), st.integers(0, 30), st.data())
@settings(deadline=None, max_examples=25)
def test_resuming_anywhere_equals_running_through(w, size, stop, data):
    """The position is all there is: a copy rebuilt from its numbers continues with the same samples."""
    other = data.draw(st.permutations(w))
    blend = (
        mixture((0, tuple(w[:6])), (7, tuple(other[:6])))
        if sum(w[:6]) * sum(other[:6])
        else mixture((0, (1.0,)))
    )
    through, end = read(blend, 40, size)
    first, middle = read(blend, stop, size)
    rebuilt = Position(
        middle.step, middle.samples_seen, tuple(Segment(**vars(s)) for s in middle.segments)
    )
    second, end_too = read(blend, 40 - stop, size, rebuilt)
    assert first + second == through
    assert end_too == end


@given(
    size=st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
    per_rank=st.integers(1, 5),
    lanes=st.integers(1, 70),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_cuts_over_1_to_64_ranks_are_equal_and_lose_nothing(size, per_rank, lanes, seed):
    number = np.arange(100, 100 + size * per_rank)
    samples = Samples(number, number * 0, number)
    lane = np.random.default_rng(seed).integers(0, lanes, len(number))
    parts = [cut(samples, lane, data_rank=r, data_parallel_size=size) for r in range(size)]
    assert {len(part.number) for part in parts} == {per_rank}
    assert sorted(np.concatenate([part.number for part in parts]).tolist()) == number.tolist()


def test_a_rank_keeps_its_lanes_when_they_divide_evenly():
    number = np.arange(64)
    samples = Samples(number, number * 0, number)
    for data_rank in range(4):
        mine = cut(samples, number % 8, data_rank=data_rank, data_parallel_size=4)
        assert set((mine.number % 8).tolist()) == {2 * data_rank, 2 * data_rank + 1}
