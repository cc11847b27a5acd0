"""Pipeline stages: balanced by cost, contiguous, never empty."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.stages import layer_costs, partition
from tests.support.layouts import config


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=9), st.integers(1, 9))
def test_partition_is_the_best_of_all_contiguous_cuts(costs: list[float], stages: int) -> None:
    if stages > len(costs):
        with pytest.raises(ValueError, match="cannot cut"):
            partition(costs, stages)
        return
    bounds = partition(costs, stages)
    assert (
        bounds[0] == 0
        and bounds[-1] == len(costs)
        and bounds == sorted(set(bounds))
        and len(bounds) == stages + 1
    )

    def heaviest(cut: tuple[int, ...]) -> float:
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(cut))

    best = min(
        heaviest((0, *inner, len(costs)))
        for inner in itertools.combinations(range(1, len(costs)), stages - 1)
    )
    assert heaviest(tuple(bounds)) == pytest.approx(best)


def test_a_large_vocabulary_takes_blocks_off_the_last_stage() -> None:
    costs = layer_costs(config().model, padded_vocab_size=4096, seq_len=32)
    bounds = partition(costs, 2)
    assert costs[-1] > 4 and bounds == [0, 5, 6], "the head outweighs all four blocks together"


def test_a_block_of_a_mixture_costs_its_choices_and_the_shared_expert() -> None:
    """Two experts of 96 and one of 32 that every token passes, three matrices each."""
    block = 64 * 16 * (2 * 4 + 2 * 2) + 16 * 4 * 32 + 64 * 3 * (2 * 96 + 32)
    costs = layer_costs(config("moe").model, padded_vocab_size=256, seq_len=32)
    assert costs[-1] == pytest.approx(256 * 64 / block)
