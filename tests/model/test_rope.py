"""Rotary positions, against complex numbers and transformers."""

import pytest
import torch

from pipeline.config.choices import RopeScaling
from pipeline.config.model import ModelConfig
from pipeline.model.rope import apply_rope, rope_table


def model(**settings) -> ModelConfig:
    return ModelConfig(hidden_size=32, num_attention_heads=4, **settings)


def test_a_position_turns_pairs_of_numbers_as_complex_numbers():
    """RoFormer's definition: number m of pair i is multiplied by exp(i m theta^(-2i / D))."""
    x = torch.randn(1, 6, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_table(model()).tables(6, x, sequence_first=False)
    ours = apply_rope(x, cos, sin)
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    angles = torch.outer(torch.arange(6.0), frequencies)
    turned = (
        torch.complex(x[..., :4], x[..., 4:])
        * torch.polar(torch.ones(6, 4), angles)[None, :, None, None]
    )
    torch.testing.assert_close(ours, torch.cat([turned.real, turned.imag], dim=-1))


def test_scores_depend_on_the_distance_alone():
    """The reason for it all: shifting queries and keys alike changes nothing."""
    q, k = torch.randn(2, 1, 1, 1, 1, 8, generator=torch.Generator().manual_seed(1))
    cos, sin = rope_table(model()).tables(20, q, sequence_first=False)

    def score(at_query: int, at_key: int) -> torch.Tensor:
        here, there = (slice(p, p + 1) for p in (at_query, at_key))
        return (
            apply_rope(q, cos[:, here], sin[:, here]) * apply_rope(k, cos[:, there], sin[:, there])
        ).sum()

    torch.testing.assert_close(score(7, 3), score(19, 15))


def test_both_layouts_hold_the_same_table():
    like = torch.zeros(1)
    table = rope_table(model())
    first = [t.flatten() for t in table.tables(5, like, sequence_first=True)]
    second = [t.flatten() for t in table.tables(5, like, sequence_first=False)]
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("scaling", ["linear", "llama3"])
def test_stretched_frequencies_are_those_of_transformers(scaling):
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    ours = rope_table(
        model(
            rope_theta=5e5,
            rope_scaling=RopeScaling[scaling],
            rope_scaling_factor=8.0,
            rope_original_max_seq_len=64,
            max_seq_len=512,
        )
    )
    parameters = {"rope_type": scaling, "factor": 8.0, "rope_theta": 5e5}
    if scaling == "llama3":
        parameters |= {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_theta=5e5,
        rope_scaling=parameters,
    )
    theirs, factor = rope_utils.ROPE_INIT_FUNCTIONS[scaling](config, torch.device("cpu"))
    assert factor == 1.0
    torch.testing.assert_close(ours.inverse_frequencies, theirs)
