"""The best and the last evaluation, as a table of runs shows them."""

from __future__ import annotations

import math

from pipeline.tracking.held_out import Evaluations
from pipeline.tracking.tracker import At, Row


def evaluation(step: int, **losses: float) -> Row:
    values = {f"val/{name}/loss": loss for name, loss in losses.items()}
    return Row(At(step, 8 * step, 0.0), {**values, "train/loss": 0.1})


def test_the_best_is_the_lowest_mean_over_the_datasets_and_knows_its_step() -> None:
    """As checkpoint.keep_best chooses; a later one that only equals it is not better."""
    found = Evaluations()
    assert found.best() == {} and found.final(At(1, 8, 0.0)) == {}
    found.take(evaluation(2, a=3.0))
    found.take(evaluation(2, b=1.0))  # the datasets of an evaluation come one by one
    found.take(evaluation(4, a=2.0, b=1.5))
    found.take(evaluation(6, a=2.0, b=1.5))
    found.take(evaluation(8, a=math.nan, b=0.1))
    assert found.best() == {"best/loss": 1.75, "best/step": 4, "best/tokens": 32}


def test_an_evaluation_of_fewer_datasets_is_no_best() -> None:
    """A kill between two datasets left the easier one alone, whose mean no other could beat."""
    found = Evaluations()
    found.take(evaluation(2, easy=1.0))
    found.take(evaluation(4, easy=0.9, hard=5.0))
    assert found.best() == {"best/loss": 2.95, "best/step": 4, "best/tokens": 32}
    found.take(evaluation(6, easy=0.8))  # held out are others from here on
    assert found.best()["best/step"] == 6


def test_the_final_evaluation_is_that_of_the_last_step() -> None:
    found = Evaluations()
    found.take(evaluation(2, a=3.0))
    found.take(evaluation(4, a=2.0))
    found.take(Row(At(4, 32, 0.0), {"val/a/ppl": None}))  # too large for JSON
    assert found.final(At(4, 32, 1.0)) == {"final/step": 4, "final/tokens": 32, "final/a/loss": 2.0}
    assert found.final(At(5, 40, 1.0)) == {}


def test_what_is_rolled_back_is_forgotten() -> None:
    """The weights of that evaluation are gone."""
    found = Evaluations()
    found.take(evaluation(2, a=3.0))
    found.take(evaluation(4, a=1.0))
    found.forget_after(3)
    assert found.best()["best/step"] == 2
