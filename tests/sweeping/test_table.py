"""What a sweep came to: of each point how far it is, and which is the best of those that are done."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.sweeping.points import Point, points_of
from pipeline.sweeping.table import keep_exit_code, lines, outcome_of


def log(folder: Path, point: Point, *, loss: float, is_done: bool) -> None:
    run = folder / point.name
    run.mkdir(parents=True)
    step = {"step": 1000, "tokens": 64, "train/loss": 9.0, "train/mean_loss": loss, "throughput/tokens_per_sec": 5e4}  # fmt: skip
    held_out = {"step": 1000, "tokens": 64, "val/a/loss": loss + 0.5, "val/b/loss": loss + 1.5}
    (run / "metrics.jsonl").write_text(f"{json.dumps(step)}\n{json.dumps(held_out)}\n")
    if is_done:
        (run / "DONE").touch()


def test_each_point_has_a_line(tmp_path: Path) -> None:
    """The best is one that is done: a killed one may have been better at its middle."""
    points = points_of(["seed=1,2,3,4,5"])
    for number, loss in ((0, 2.0), (1, 1.0), (2, 1.5), (3, 0.5)):
        log(tmp_path, points[number], loss=loss, is_done=number in (0, 2))
    keep_exit_code(tmp_path, points[1], 137)
    found = list(lines([outcome_of(tmp_path, point) for point in points]))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found[:7]]
    assert cells[0] == ["point", "seed", "state", "step", "held-out loss", "training loss", "tokens/s"]  # fmt: skip
    assert cells[2] == ["0", "1", "done", "1,000", "3.0000", "2.0000", "50,000"]
    assert [row[2] for row in cells[3:]] == ["FAILED, exit code 137", "done", "not done", "not begun"]  # fmt: skip
    assert len({len(line) for line in found[:7]}) == 1
    assert "least held-out loss: point 2, seed=3: 2.5000" in found[7]
    assert "not done: 1, 3, 4." in found[8]


def test_a_point_does_not_inherit_the_end_of_another(tmp_path: Path) -> None:
    """With one value more the numbers move, and a point that nobody began was told as failed."""
    keep_exit_code(tmp_path, points_of(["optimizer.lr=0.1,0.2", "seed=1,2"])[2], 137)
    outcomes = [outcome_of(tmp_path, p) for p in points_of(["optimizer.lr=0.1,0.2", "seed=1,2,3"])]
    assert {outcome.state for outcome in outcomes} == {"not begun"}


def test_a_value_stays_in_its_cell(tmp_path: Path) -> None:
    points = points_of(["data.path='a|b',c"])
    header, rule, first, second, *_ = lines([outcome_of(tmp_path, point) for point in points])
    assert r"a\|b" in first and len({len(line) for line in (header, rule, first, second)}) == 1
