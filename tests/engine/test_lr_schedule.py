"""The learning rate at hand-worked points of every shape."""

from __future__ import annotations

import pytest

from pipeline.config.choices import Decay
from pipeline.config.training import ScheduleConfig
from pipeline.engine.lr_schedule import lr_at


def at(
    step: int, decay: str, *, warmup: int = 10, total: int = 110, decay_steps: int | None = None
) -> float:
    schedule = ScheduleConfig(decay=Decay[decay], min_lr=0.1, decay_steps=decay_steps)
    return lr_at(step, lr=1.0, schedule=schedule, warmup_steps=warmup, total_steps=total)


@pytest.mark.parametrize("decay", [d.name for d in Decay])
def test_warmup_is_linear_and_reaches_the_peak(decay: str) -> None:
    assert [at(s, decay) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])


def test_cosine_is_half_way_in_the_middle_and_ends_at_min_lr() -> None:
    assert [at(s, "cosine") for s in (10, 60, 110, 500)] == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_linear_ends_at_min_lr() -> None:
    assert [at(s, "linear") for s in (10, 60, 110)] == pytest.approx([1.0, 0.55, 0.1])


def test_wsd_stays_at_the_peak_and_descends_over_the_last_fifth() -> None:
    assert [at(s, "wsd") for s in (10, 87, 88, 99, 110)] == pytest.approx(
        [1.0, 1.0, 1.0, 0.55, 0.1]
    )
    assert [at(s, "wsd", decay_steps=10) for s in (100, 105, 110)] == pytest.approx(
        [1.0, 0.55, 0.1]
    )


def test_constant_never_falls() -> None:
    assert at(10**6, "constant") == 1.0
