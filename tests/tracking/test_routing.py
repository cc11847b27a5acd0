"""What routers did, as metrics: worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline.config.model import MoeConfig
from pipeline.tracking.routing import routing_values
from tests.support.ranks import run_on_ranks
from tests.support.small_runs import overrides, train_on_ranks, write_data


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


@pytest.mark.slow
def test_a_run_logs_what_its_routers_do_on_all_ranks(tmp_path: Path) -> None:
    """Two ranks with two experts a layer each: logged once, of all tokens of the steps since the last row."""
    data = write_data(tmp_path / "data")
    moe = {"num_experts": 4, "ffn_hidden_size": 32}
    settings = {f"model.moe.{key}": value for key, value in moe.items()}
    settings |= {"model.bias": "false", "parallel.expert_parallel_size": 2, "tracking.log_every": 5}
    run_on_ranks(train_on_ranks, 2, overrides(data, tmp_path, "spread", **settings))
    lines = (tmp_path / "spread" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "moe/load" in row]
    assert [row["step"] for row in rows] == [5, 10]
    for row in rows:
        assert row["moe/dropped_tokens"] == 0
        assert all(sum(layer) == pytest.approx(4, abs=0.002) for layer in row["moe/load"])
        assert (len(row["moe/load"]), len(row["moe/load"][0])) == (4, 4)
        assert 0 < row["moe/router_entropy"] <= math.log(4) + 1e-6
