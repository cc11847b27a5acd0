"""What a JSON value must be, and how a value that is not is told."""

import pytest

from pipeline.shapes import COUNT, misfits

SHAPE = {
    "step": COUNT,
    "loss": (None, float),
    "names?": [str],
    "sizes?": {str: range(1, 10)},
    "inner?": {"flag": bool},
}
GOOD = {"step": 3, "loss": 1, "names": ["a"], "sizes": {"x": 9}, "inner": {"flag": True}, "new": 0}


def test_a_value_of_its_shape_is_let_through_with_what_it_has_besides():
    assert list(misfits(GOOD, SHAPE)) == []
    assert list(misfits({"step": 0, "loss": None}, SHAPE)) == []


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([], ["it is []"]),
        ({"loss": None}, ["it has no step"]),
        (GOOD | {"step": -1}, ["step is -1"]),
        (GOOD | {"step": True}, ["step is True"]),
        (GOOD | {"step": 3.0}, ["step is 3.0"]),
        (GOOD | {"step": 10**40}, ["step is 1" + "0" * 40]),
        (GOOD | {"loss": "1"}, ["loss is '1'"]),
        (GOOD | {"loss": 10**400}, ["loss is 1" + "0" * 59 + "..."]),
        (GOOD | {"names": ["a", 1]}, ["names[1] is 1"]),
        (GOOD | {"names": "a"}, ["names is 'a'"]),
        (GOOD | {"sizes": {"x": 0, "y": 10}}, ["sizes.x is 0", "sizes.y is 10"]),
        (GOOD | {"inner": {}}, ["inner has no flag"]),
        (GOOD | {"inner": {"flag": 1}}, ["inner.flag is 1"]),
    ],
    ids=str,
)
def test_a_misfit_is_told_by_its_place(value, found):
    assert list(misfits(value, SHAPE)) == found
