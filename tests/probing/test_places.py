"""Names of places."""

from __future__ import annotations

import pytest

from pipeline.errors import ConfigError
from pipeline.probing.places import Place


def test_a_place_is_a_canonical_name() -> None:
    names = ("embedding", "layers.0", "layers.11", "layers.3.self_attention", "layers.3.mlp")
    assert [Place.of(name, num_layers=12) for name in names] == [
        Place(0, "input"), Place(0, "block"), Place(11, "block"), Place(3, "self_attention"), Place(3, "mlp")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["layers.12", "layers", "layers.1.mlp.linear_fc1", "layers.x", "head"]
)
def test_another_name_is_answered_with_those_that_there_are(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"there are embedding .* layers.0 to layers.11 .* layers.11.mlp"
    ):
        Place.of(name, num_layers=12)
