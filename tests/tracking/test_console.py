"""What somebody at the terminal sees: lines that fit it, with a loss that means something and one time to go."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from pipeline import log
from pipeline.tracking.console import Console, duration, short
from pipeline.tracking.samples import Sample

SMALL = {
    "train/mean_loss": 3.44531, "train/loss": 9.0, "train/lr": 2.1e-3, "train/grad_norm": 0.5123,
    "throughput/tokens_per_sec": 12345.0, "throughput/mfu": None,
}  # fmt: skip
LARGE = SMALL | {"throughput/tokens_per_sec": 1.23e7, "throughput/mfu": 0.4512}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(log.logger, "propagate", True)
    with caplog.at_level(logging.INFO, logger=log.logger.name):
        yield lambda: [record.getMessage() for record in caplog.records]


def state(step: int, tokens: int) -> SimpleNamespace:
    return SimpleNamespace(step=step, tokens_seen=tokens)


def test_a_step_is_one_line_with_the_mean_loss_and_one_time_to_go(said) -> None:
    """The last step's loss alone scatters; the bar had a second, other time."""
    Console(total_steps=1800, total_tokens=1800 * 1024, progress=False).show_step(
        state(1200, 1200 * 1024), SMALL
    )
    assert said() == [
        "step 1200/1800 | loss 3.4453 | norm 0.512 | 12.3k tok/s | eta 50s",
    ]  # fmt: skip


def test_a_line_fits_the_terminal_at_any_size(said) -> None:
    """What there is no room for is in metrics.jsonl; loss, rate and time stay."""
    total = 300_000_000_000
    console = Console(total_steps=123_978, total_tokens=total, progress=False)
    console.show_step(state(123_977, 1000), LARGE)
    console.show_step(state(7, 1000), LARGE)
    console.show_evaluation(state(7, 1000), "a-dataset-with-a-long-name/validation", {"loss": 3.0, "ppl": 20.0855, "bits_per_byte": 1.7})  # fmt: skip
    lines = said()
    assert all(len(line) <= log.COLUMNS for line in lines[:2]) and len(lines) == 3
    assert "loss 3.4453" in lines[0] and "12.3M tok/s" in lines[0] and "eta 6h 46m" in lines[0]


def test_a_sample_is_one_line(said) -> None:
    """Whatever the model writes: line ends, and what would command the terminal."""
    console = Console(total_steps=9, total_tokens=9, progress=False)
    console.show_samples(state(4, 4), [Sample("a", "\n b\x1b[2J 100%"), Sample("", "word " * 50)])
    assert said()[0] == r"step 4: writes: a b\x1b[2J 100%"
    assert len(said()[1]) == log.COLUMNS and said()[1].endswith("...")


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0s"), (45, "45s"), (192, "3m 12s"), (4 * 3600 + 300, "4h 05m"), (12.13 * 86400, "12d 03h")],
)  # fmt: skip
def test_durations_have_their_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "number, text",
    [
        (950, "950"),
        (12345, "12.3k"),
        (4.56e6, "4.56M"),
        (2e9, "2G"),
        (0.5, "0.5"),
        (999.7, "1k"),
        (999_600, "1M"),
        (999_400, "999k"),
    ],
)
def test_counts_have_three_figures(number: float, text: str) -> None:
    assert short(number) == text
