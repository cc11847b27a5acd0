"""What metrics.jsonl says, after restarts and in the middle of a line."""

import json
import math

import pytest

from pipeline.errors import DataError
from pipeline.tracking.history import History


def write(run_dir, *rows, tail=""):
    lines = [json.dumps(row) for row in rows]
    (run_dir / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines) + tail)
    return run_dir


def step(number, loss=1.0, **values):
    return {"step": number, "tokens": 8 * number, "train/loss": loss, **values}


def test_of_steps_that_a_restart_repeats_the_later_values_count(tmp_path):
    history = History.load(write(tmp_path, step(1, 4.0), step(2, 3.0), step(3, 9.0), step(2, 3.5)))
    assert [(row["step"], row["train/loss"]) for row in history.steps] == [
        (1, 4.0),
        (2, 3.5),
        (3, 9.0),
    ]


def test_half_a_line_is_left_out(tmp_path):
    """A killed process leaves one; the next start goes on behind it."""
    history = History.load(write(tmp_path, step(1), tail='{"step": 2, "train/lo'))
    assert [row["step"] for row in history.steps] == [1]


def test_evaluations_are_told_apart_by_dataset(tmp_path):
    rows = [
        {"step": 2, "tokens": 16, "val/wiki/loss": 2.0, "val/wiki/ppl": 7.4, "val/a/b/loss": 3.0},
        {"step": 1, "tokens": 8, "val/wiki/loss": 2.5, "val/wiki/tokens": 640},
    ]
    unknown = pytest.approx(math.nan, nan_ok=True)
    history = History.load(write(tmp_path, step(1), *rows))
    common = {"hours": unknown, "scored": unknown, "ppl": unknown, "bits_per_byte": unknown}
    assert history.evaluations == {
        "a/b": [{"step": 2, "tokens": 16, "loss": 3.0, **common}],
        "wiki": [
            {"step": 1, "tokens": 8, "loss": 2.5, **common, "scored": 640},
            {"step": 2, "tokens": 16, "loss": 2.0, **common, "ppl": 7.4},
        ],
    }


def test_time_runs_from_the_first_start_and_a_start_s_first_speed_is_none(tmp_path):
    """A start allocates memory in its first step, and so does the one after a requeue."""
    start = {"event": "start", "time": 1000.0}
    rate = "throughput/tokens_per_sec"
    rows = [step(n, time=1000.0 + 3600 * n, **{rate: 10.0 * n}) for n in (1, 2, 3, 4)]
    history = History.load(write(tmp_path, start, *rows[:2], {**start, "time": 9e3}, *rows[2:]))
    assert history.column("hours") == [1, 2, 3, 4]
    assert [row["step"] for row in history.steps if math.isfinite(row["warm_rate"])] == [2, 4]
    assert history.tokens_per_sec == 40.0 and (history.began, history.ended) == (1000, 15400)


def test_a_value_that_is_not_known_is_nan(tmp_path):
    history = History.load(write(tmp_path, step(1, lr=0.1), step(2), step(3, lr=None)))
    assert history.column("lr")[0] == 0.1
    assert all(math.isnan(value) for value in history.column("lr")[1:])


def test_a_model_has_no_million_blocks(tmp_path):
    """Each is a curve: 20,000 of them took the report 23 s."""
    row = step(1) | {f"lens/loss_{block}": 1.0 for block in range(2000)}
    assert len(History.load(write(tmp_path, row)).lens[0]["losses"]) == 1024


def test_the_last_start_says_what_runs(tmp_path):
    starts = [{"event": "start", "world_size": n, "facts": {"device": f"d{n}"}} for n in (2, 4)]
    assert History.load(write(tmp_path, *starts, step(1))).facts == {
        "world_size": 4,
        "device": "d4",
    }


def test_a_run_without_a_logged_step_is_named(tmp_path):
    with pytest.raises(DataError, match="no logged step"):
        History.load(write(tmp_path, {"event": "start", "world_size": 1, "facts": {}}))
