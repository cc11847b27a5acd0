"""What a JSON value must be, and how a value that is not is told."""

import pytest

from pipeline.errors import DataError
from pipeline.shapes import COUNT, misfits, read_object

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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"a\.json cannot be read: .*No such file"),
        (b"{", r"a\.json cannot be read: Expecting"),
        (b"\xff", r"a\.json cannot be read: .*decode"),
        (b"[" * 100_000, r"a\.json cannot be read: it is nested too deeply"),
        (b"[]", r"a\.json is no list of ours: it is \[\]\. Remove it\."),
        (b'{"x": -1}', r"a\.json is no list of ours: x is -1\. Remove it\."),
    ],
)
def test_a_file_that_holds_no_such_object_ends_in_one_sentence(tmp_path, content, said):
    """Whatever is wrong with it: a traceback of json says nothing of whose file it is."""
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_object(
            tmp_path / "a.json", {"x": range(9)}, error=DataError,
            misfit="is no list of ours", advice="Remove it.",
        )  # fmt: skip


def test_an_object_is_read_with_what_it_has_besides(tmp_path):
    (tmp_path / "a.json").write_text('{"x": 8, "y": []}')
    found = read_object(tmp_path / "a.json", {"x": range(9)}, error=DataError, misfit="is none")
    assert found == {"x": 8, "y": []}
