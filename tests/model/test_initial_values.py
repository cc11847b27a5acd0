"""Initial weights: the same for every layout, with the std their papers give."""

from __future__ import annotations

import math
import threading
from functools import partial
from typing import Any

import pytest
import torch

from pipeline.config.choices import Init
from pipeline.config.model import ModelConfig
from pipeline.model import initial_values
from pipeline.model.initial_values import ROWS, initial_std, initialize
from pipeline.model.partition import Partition
from tests.support.waiting import HANG_S

MODEL = ModelConfig(name="t", num_layers=8, hidden_size=512, num_attention_heads=8)


def shard(rank: int, size: int, *, dim: int, stride: int = 1) -> torch.Tensor:
    shape = [1200, 48]
    shape[dim] //= size
    part = Partition.of(tuple(shape), dim=dim, stride=stride, tensor_rank=rank, tensor_size=size)
    tensor = torch.empty(shape)
    initialize(tensor, "layers.3.mlp.linear_fc1.weight", part, model=MODEL, seed=1)
    return tensor


@pytest.mark.parametrize("size", [2, 3])
def test_every_tensor_parallel_size_draws_the_same_numbers(size: int) -> None:
    whole = shard(0, 1, dim=0)
    assert torch.equal(torch.cat([shard(r, size, dim=0) for r in range(size)]), whole)
    assert torch.equal(torch.cat([shard(r, size, dim=1) for r in range(size)], dim=1), whole)


def test_threads_draw_at_a_time_and_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread would need 20 s for a 7B model; which of them draws a block must not matter."""
    one, two = torch.empty(4 * ROWS, 48), torch.empty(4 * ROWS, 48)
    fill: Any = partial(
        initialize, name="head.weight", part=Partition.of((4 * ROWS, 48)), model=MODEL, seed=1
    )
    fill(one)
    pair, draw = threading.Barrier(2, timeout=HANG_S), initial_values.draw

    def draw_in_pairs(*args: Any, **kwargs: Any) -> torch.Tensor:
        pair.wait()  # raises where a thread is alone
        return draw(*args, **kwargs)

    monkeypatch.setattr(initial_values, "draw", draw_in_pairs)
    fill(two, num_threads=2)
    assert torch.equal(one, two)


def test_gated_projections_are_cut_gate_by_gate() -> None:
    whole, halves = shard(0, 1, dim=0), [shard(r, 2, dim=0, stride=2) for r in range(2)]
    gate, up = zip(*(h.chunk(2) for h in halves))
    assert torch.equal(torch.cat([*gate, *up]), whole)


def test_padding_rows_start_at_zero() -> None:
    part = Partition.of((64, 8), dim=0, tensor_rank=1, tensor_size=2, real_size=100)
    tensor = torch.empty(64, 8)
    initialize(tensor, "embedding.word.weight", part, model=MODEL, seed=1)
    assert tensor[:36].abs().sum() > 0 and torch.equal(tensor[36:], torch.zeros(28, 8))


def test_norms_start_at_one_and_biases_at_zero() -> None:
    for name, value in (
        ("final_norm.weight", 1.0),
        ("layers.0.self_attention.q_layernorm.weight", 1.0),
        ("layers.0.mlp.linear_fc1.bias", 0.0),
    ):
        tensor = torch.empty(16)
        initialize(tensor, name, Partition.of((16,)), model=MODEL, seed=1)
        assert torch.equal(tensor, torch.full((16,), value))


def test_residual_projections_are_scaled_by_depth() -> None:
    assert initial_std("layers.0.mlp.linear_fc2.weight", MODEL) == pytest.approx(
        0.02 / math.sqrt(16)
    )
    assert initial_std("layers.0.mlp.linear_fc1.weight", MODEL) == 0.02
    assert shard(0, 1, dim=0).std() == pytest.approx(0.02, rel=0.02)


def test_mup_shrinks_hidden_matrices_with_width() -> None:
    mup = ModelConfig(
        name="t",
        num_layers=8,
        hidden_size=1024,
        num_attention_heads=8,
        init=Init.mup,
        mup_base_hidden_size=256,
    )
    assert initial_std("layers.0.mlp.linear_fc1.weight", mup) == pytest.approx(0.01)
    assert initial_std("embedding.word.weight", mup) == 0.02
