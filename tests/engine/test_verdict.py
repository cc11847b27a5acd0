"""What the optimizer is told of a step, against torch's clipping and by hand."""

import math

import pytest
import torch

from pipeline.engine.verdict import decide_update


def decide(
    norm: float,
    *,
    clip: float = 1.0,
    loss: float | None = None,
    limit: float = math.inf,
    scale: float | None = None,
):
    return decide_update(
        torch.tensor(norm),
        clip_grad=clip,
        loss=None if loss is None else torch.tensor(loss),
        max_loss=limit,
        loss_scale=None if scale is None else torch.tensor(scale),
    )


@pytest.mark.parametrize("size", [0.1, 1.0, 40.0])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_divided_gradients_are_those_that_torch_clips(size, scale):
    gradient = torch.full((9,), size)
    clipped = torch.nn.Parameter(torch.zeros(9))
    clipped.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_([clipped], 1.0)
    verdict = decide(float(gradient.norm()), scale=scale)
    torch.testing.assert_close(gradient * (scale or 1.0) / verdict.grad_scale, clipped.grad)


def test_without_clipping_or_scale_there_is_nothing_to_divide_by():
    assert decide(40.0, clip=0.0).grad_scale is None
    assert decide(40.0, clip=0.0, scale=8.0).grad_scale == 8.0


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_leaves_the_step_out(norm):
    verdict = decide(norm)
    assert verdict.overflowed and verdict.left_out


@pytest.mark.parametrize(
    "loss, left_out", [(2.0, False), (3.0, False), (3.1, True), (math.nan, True), (math.inf, True)]
)
def test_a_loss_above_the_limit_leaves_the_step_out_without_an_overflow(loss, left_out):
    """The loss scale must not be halved for a spike."""
    verdict = decide(1.0, loss=loss, limit=3.0)
    assert bool(verdict.left_out) is left_out
    assert not verdict.overflowed
