"""fp16's loss scale, against torch.amp.GradScaler's rule."""

import torch

from pipeline.engine.loss_scale import GROWTH_INTERVAL, INITIAL_SCALE_POWER, LossScale

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


def after(*overflows: bool, start: LossScale | None = None) -> LossScale:
    scale = start or LossScale(CPU)
    for overflow in overflows:
        scale.update(YES if overflow else NO)
    return scale


def test_an_overflow_halves_it():
    assert after(True, True).cur_scale == 2.0 ** (INITIAL_SCALE_POWER - 2)


def test_it_doubles_after_a_run_of_good_steps_and_an_overflow_begins_the_run_anew():
    grown = after(*[False] * GROWTH_INTERVAL)
    assert grown.cur_scale == 2.0 ** (INITIAL_SCALE_POWER + 1)
    interrupted = after(*[False] * (GROWTH_INTERVAL - 1), True, *[False] * (GROWTH_INTERVAL - 1))
    assert interrupted.cur_scale == 2.0 ** (INITIAL_SCALE_POWER - 1)


def test_it_never_falls_below_1():
    """Below 1 it would make small gradients vanish, which is what it is there to prevent."""
    assert after(*[True] * 40).cur_scale == 1.0


def test_a_restored_scale_goes_on_as_if_it_had_not_stopped():
    """Through JSON: scale and the count of good steps."""
    whole = after(True, *[False] * GROWTH_INTERVAL)
    first = after(True, *[False] * (GROWTH_INTERVAL - 5))
    second = LossScale(CPU)
    second.restore(first.state())
    assert after(*[False] * 5, start=second).state() == whole.state()


def test_gradients_carry_the_scale():
    weight = torch.tensor(3.0, requires_grad=True)
    LossScale(CPU).backward(weight * 2)
    assert weight.grad == 2.0 * 2.0**INITIAL_SCALE_POWER
