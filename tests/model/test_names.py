"""One name for a parameter, whatever the layout calls it."""

import pytest

from pipeline.model.names import canonical_name


@pytest.mark.parametrize(
    "whole, staged",
    [
        ("embedding.word.weight", "0.word.weight"),
        ("embedding.word.weight", "tied_modules.embedding.word.weight"),
        ("embedding.position.weight", "0.position.weight"),
        ("layers.0.mlp.linear_fc1.weight", "1.mlp.linear_fc1.weight"),
        ("layers.11.mlp.linear_fc1.weight", "12.mlp.linear_fc1.weight"),
        ("head.norm.weight", "13.norm.weight"),
        ("head.word.weight", "13.word.weight"),
    ],
)
def test_a_pipeline_and_one_process_agree(whole, staged):
    """PipelineModule numbers its layers: embedding, 12 blocks, head."""
    assert canonical_name(staged, num_layers=12) == canonical_name(whole, num_layers=12)


def test_the_head_is_told_from_its_norm():
    assert canonical_name("head.norm.weight", num_layers=2) == "final_norm.weight"
    assert canonical_name("3.word.weight", num_layers=2) == "head.weight"


def test_a_canonical_name_stays():
    for name in (
        "embedding.word.weight",
        "layers.1.mlp.linear_fc2.bias",
        "final_norm.weight",
        "head.weight",
    ):
        assert canonical_name(name, num_layers=2) == name
