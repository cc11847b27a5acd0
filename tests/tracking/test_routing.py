"""What routers did, as metrics: worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.config.model import MoeConfig
from pipeline.tracking.routing import routing_values


def test_loads_are_over_an_even_share_and_nothing_is_dropped() -> None:
    """Ten tokens to two of four experts each: an even share is five."""
    even, lonely = [5.0, 5.0, 5.0, 5.0], [10.0, 10.0, 0.0, 0.0]
    sums = torch.tensor([[*even, 10 * math.log(4), 10.0], [*lonely, 0.0, 10.0]]).double()
    values = routing_values(sums, MoeConfig(num_experts=4, top_k=2))
    assert values["moe/load"] == [[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 0.0, 0.0]]
    assert (values["moe/load_max"], values["moe/load_min"]) == (2.0, 0.0)
    assert values["moe/router_entropy"] == pytest.approx(math.log(4) / 2)
    assert values["moe/dropped_tokens"] == 0


def test_a_dropped_token_is_counted() -> None:
    """Always 0 here: a router with a capacity, some day, must not go unnoticed."""
    sums = torch.tensor([[3.0, 4.0, 1.0, 4.0]]).double()
    assert routing_values(sums, MoeConfig(num_experts=2, top_k=2))["moe/dropped_tokens"] == 1


def test_before_the_first_step_nothing_is_known() -> None:
    values = routing_values(torch.zeros(1, 4).double(), MoeConfig(num_experts=2, top_k=2))
    assert values["moe/load_max"] == values["moe/router_entropy"] == 0.0
