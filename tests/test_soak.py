"""The soak itself: what grows and what is lost is found, and a short one passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import Look, problems, rows, soak

FLAT = [Look(step, 300.0 + step % 3, 9, 20, 1.0) for step in range(20, 1001, 20)]
ROWS = [{"step": step, "train/loss": 1.0} for step in range(10, 1001, 10)]
ROWS += [{"step": step, "val/validation/loss": 1.0} for step in range(100, 1001, 100)]


def test_what_stays_as_it_is_is_no_problem() -> None:
    assert problems(FLAT, ROWS, steps=1000, eval_every=100) == []


@pytest.mark.parametrize(
    ("looks", "rows", "told"),
    [
        ([look._replace(memory_mb=300 + look.step / 50) for look in FLAT], ROWS, "memory grew from 304.0 to 318.0 MB"),
        ([look._replace(threads=9 + look.step // 500) for look in FLAT], ROWS, "threads grew from 9 to 10"),
        ([look._replace(files=20 + look.step // 500) for look in FLAT], ROWS, "files grew from 20 to 21"),
        (FLAT, ROWS[:50] + ROWS[51:], "1 steps were not logged, the first is 510"),
        (FLAT, ROWS[:-1], "1 steps were not evaluated, the first is 1000"),
        (FLAT, [*ROWS, ROWS[7]], "1 steps were logged twice, the first is 80"),
        (FLAT[:10], ROWS, "10 looks are too few"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_grows_and_what_is_lost_is_told(looks: list[Look], rows: list[dict], told: str) -> None:  # fmt: skip
    """A soak that cannot fail shows nothing."""
    assert problems(looks, rows, steps=1000, eval_every=100) == [told]


def test_half_a_line_that_an_ended_run_leaves_is_no_row(tmp_path: Path) -> None:
    """While it runs one may be seen: a line that crosses a page is written in two halves."""
    (tmp_path / "metrics.jsonl").write_text('{"step":1}\n{"step":2,"train/lo')
    with pytest.raises(ValueError, match="Unterminated"):
        rows(tmp_path)


@pytest.mark.slow
def test_a_short_soak_is_flat(tmp_path: Path) -> None:
    """`make soak` takes 20,000 steps."""
    assert "400 steps" in soak(tmp_path, steps=400)
