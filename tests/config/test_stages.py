"""Pipeline stages: balanced by cost, contiguous, never empty."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.finetune import FinetuneConfig
from pipeline.config.parameter_names import parameter_shapes
from pipeline.config.stages import encoder_products, layer_costs, partition, pipeline_costs
from tests.support.layouts import VOCAB, config
from tests.support.ranks import run_on_ranks


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


def test_pictures_are_counted_on_the_first_stage() -> None:
    """By hand: two pictures of four patches with each row of 32 tokens."""
    model = config("pictures").model
    block = 4 * 64**2 + 2 * 64 * 16 + 2 * 64 * 256  # projections, half of the scores, MLP
    of_encoder = 4 * 32**2 + 2 * 32 * 4 + 2 * 32 * 128  # a patch sees all four
    patch = (3 * 8 * 8) * 32 + 2 * of_encoder + 32 * 64 + 64 * 64
    sizes = {"padded_vocab_size": 256, "seq_len": 32}
    without = layer_costs(model, **sizes)
    costs = layer_costs(model, **sizes, images_per_row=2)
    assert costs[0] == pytest.approx(0.01 + 2 * 4 * patch / 32 / block)
    assert without[0] == 0.01 and costs[1:] == without[1:]


def test_a_heavy_encoder_has_fewer_blocks_beside_it() -> None:
    """Each stage takes as long as the slowest: uncounted, that is the one with the encoder."""
    model = config("pictures").model
    sizes = {"padded_vocab_size": 256, "seq_len": 32}
    cuts = [partition(pipeline_costs(model, **sizes, images_per_row=n), 2)[1] for n in (0, 20)]
    # [embedding, four blocks, a copy of the tied weight, head]
    assert cuts == [3, 2]


def counted(images: int) -> int:
    """Floating-point operations that torch counts in an encoder's forward pass."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from pipeline.model.local_model import LocalModel

    model = replace(config("pictures").model, vocab_size=VOCAB)
    shapes = parameter_shapes(model, FinetuneConfig(), vocab_size=VOCAB)
    vision = LocalModel(model, lambda name: torch.zeros(shapes[name])).gpt.embedding.vision
    assert vision is not None
    # The counter knows no CPU kernel of attention; plain attention is two products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vision(torch.zeros(1, images, 3, 16, 16, dtype=torch.uint8))
    return int(counter.get_total_flops())


def test_a_picture_costs_what_torchs_counter_finds() -> None:
    """Two operations to a multiply-add."""
    (found,) = run_on_ranks(counted, 1, 3)
    assert found == 3 * 2 * encoder_products(config("pictures").model)
