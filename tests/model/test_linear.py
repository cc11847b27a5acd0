"""The products of a linear: the same numbers, whenever those of the weight are computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.model.float8 import product, quantize
from pipeline.model.linear import LateProducts, multiply


def factors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, nn.Parameter, torch.Tensor]:
    """(x, weight, gradient of the result)."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32, dtype=dtype).requires_grad_()
    return x, nn.Parameter(torch.randn(48, 32, dtype=dtype)), torch.randn(2, 5, 48, dtype=dtype)


def own_gradients() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weight, gradient = factors()
    y = F.linear(x, weight)
    y.backward(gradient)
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("is_late", [False, True])
def test_results_and_gradients_are_torchs(is_late: bool) -> None:
    x, weight, gradient = factors()
    late = LateProducts() if is_late else None
    y = multiply(x, weight, late=late)
    y.backward(gradient)
    if late is not None:
        late.work_off()
    for got, want in zip((y.detach(), x.grad, weight.grad), own_gradients(), strict=True):
        torch.testing.assert_close(got, want)


def test_a_late_product_waits_and_its_hooks_hear_of_it_once_each() -> None:
    """ZeRO and the fp32 sums live in such hooks; a hook that hears of nothing counts a gradient that is not there."""
    x, weight, gradient = factors()
    heard: list[torch.Tensor] = []
    weight.register_post_accumulate_grad_hook(lambda p: heard.append(p.grad.clone()))
    late = LateProducts()
    for _ in range(2):  # two micro-batches
        multiply(x, weight, late=late).backward(gradient)
    assert x.grad is not None and weight.grad is None and (len(late), len(heard)) == (2, 0)
    late.work_off()
    once = own_gradients()[2]
    assert (len(late), len(heard)) == (0, 2)
    torch.testing.assert_close(heard[0], once)
    torch.testing.assert_close(weight.grad, 2 * once)


def test_a_frozen_weight_leaves_nothing_and_an_input_without_gradient_does_not_wait() -> None:
    x, weight, gradient = factors()
    late = LateProducts()
    weight.requires_grad_(False)
    multiply(x, weight, late=late).backward(gradient)
    torch.testing.assert_close(x.grad, own_gradients()[1])
    assert weight.grad is None and len(late) == 0
    weight.requires_grad_(True)
    multiply(x.detach(), weight, late=late).backward(gradient)
    torch.testing.assert_close(weight.grad, own_gradients()[2])
    assert len(late) == 0


def distance(got: torch.Tensor | None, want: torch.Tensor) -> float:
    assert got is not None
    return float((got.float() - want.float()).norm() / want.float().norm())


def test_float8_products_are_near_those_of_bf16_and_the_weights_gradient_is_one_of_them() -> None:
    """e4m3 has three bits of mantissa: 3.7 % of a random product."""
    x, weight, gradient = factors(torch.bfloat16)
    y = multiply(x, weight, is_float8=True)
    y.backward(gradient)
    assert y.dtype is torch.bfloat16
    results: list[Any] = [y.detach(), x.grad]
    for got, want in zip(results, own_gradients()[:2], strict=True):
        assert 0.01 < distance(got, want) < 0.05
    exact = gradient.flatten(0, 1).float().t() @ x.detach().flatten(0, 1).float()
    assert distance(weight.grad, exact) < 0.005


def test_rows_keep_their_size_whatever_their_neighbours() -> None:
    """One factor for all would lose a row a million times smaller; a row of zeros stays zeros."""
    rows = torch.tensor([[1e-6], [1.0], [1e6], [0.0]]) * torch.linspace(-1, 1, 16)
    numbers, factor = quantize(rows)
    assert factor.shape == (4, 1) and torch.isfinite(numbers.float()).all()
    torch.testing.assert_close(numbers.float() * factor, rows, rtol=0.07, atol=1e-9)
    found = product(rows.bfloat16(), torch.eye(16, dtype=torch.bfloat16))
    torch.testing.assert_close(found.float(), rows, rtol=0.08, atol=1e-9)
