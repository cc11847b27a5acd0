"""Numbers that no run can have are refused before anything starts, each by its name."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from pipeline import cli
from pipeline.config import number_rules
from pipeline.config.evaluation import Evaluation
from pipeline.config.number_rules import broken_numbers
from pipeline.config.pretrain import PretrainConfig

ALL = [*number_rules.LEAST.values(), number_rules.ABOVE_0, number_rules.BELOW_1]


def test_every_number_that_is_judged_belongs_to_a_run_or_to_an_evaluation() -> None:
    """A misspelt section would be taken for one that is not there, and never be judged."""
    known = {field.name for kind in (PretrainConfig, Evaluation) for field in fields(kind)}
    assert {key.split(".")[0] for keys in ALL for key in keys.split()} <= known


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
def test_what_is_no_number_of_a_run_is_named(value: float) -> None:
    """NaN passes every comparison that asks for what is wrong: these ask for what is right."""
    cfg = cli.compose(PretrainConfig, ["name=a"], config="pretrain")
    assert list(broken_numbers(vars(cfg))) == []
    keys = [*number_rules.LEAST[0].split(), *number_rules.ABOVE_0.split()]
    for key in dict.fromkeys(key for key in keys if "." in key):
        owner, _, name = key.rpartition(".")
        section: object = cfg
        for part in owner.split("."):
            section = getattr(section, part)
        before = getattr(section, name)
        setattr(section, name, value)
        found = dict(broken_numbers(vars(cfg)))
        assert key in found and f"({value})" in found[key], key
        setattr(section, name, before)


@pytest.mark.parametrize("key", number_rules.BELOW_1.split())
def test_shares_are_below_1(key: str) -> None:
    """A dropout of 1 leaves nothing, a beta of 1 never learns."""
    cfg = cli.compose(PretrainConfig, ["name=a", f"{key}=1.0"], config="pretrain")
    assert list(broken_numbers(vars(cfg))) == [(key, f"{key} (1.0) must be below 1.")]
