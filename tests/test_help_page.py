"""How --help writes a value: as the command line takes it."""

from __future__ import annotations

import pytest

from pipeline import help_page, report
from pipeline.config.choices import Precision
from pipeline.report import ReportConfig, main


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "null"), (True, "true"), (["a", None], "[a, null]"), ({"a": 0.5}, "{a: 0.5}"),
        ("???", "(required)"), (Precision.bf16, "bf16"), (6e-4, "0.0006"), ("", ""),
    ],
)  # fmt: skip
def test_a_value_is_shown_as_it_is_typed(value, text):
    assert help_page.shown(value) == text


def test_the_page_is_as_wide_as_the_terminal(monkeypatch):
    """The docstring was of 100 columns in one of 80; a command is not broken, it is copied."""
    monkeypatch.setenv("COLUMNS", "60")
    page = help_page.help_text(main, ReportConfig, groups={}, values=vars(ReportConfig("x")), positional=["run"])  # fmt: skip
    commands = [line for line in page.splitlines() if line.startswith("    ")]
    assert "    python -m pipeline.report runs/NAME beside=[runs/OTHER,runs/THIRD]" in commands
    assert all(len(line) <= 60 for line in page.splitlines() if line not in commands)
    assert " ".join(page.split()).startswith(" ".join((report.__doc__ or "").split()))
