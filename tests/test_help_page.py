"""How --help writes a value: as the command line takes it."""

from __future__ import annotations

import pytest

from pipeline import help_page
from pipeline.config.choices import Precision


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "null"), (True, "true"), (["a", None], "[a, null]"), ({"a": 0.5}, "{a: 0.5}"),
        ("???", "(required)"), (Precision.bf16, "bf16"), (6e-4, "0.0006"), ("", ""),
    ],
)  # fmt: skip
def test_a_value_is_shown_as_it_is_typed(value, text):
    assert help_page.shown(value) == text
