"""Hostile run folders: every use ends well or in a PipelineError; no traceback, hang, code or file elsewhere."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.operation import TrackingConfig
from pipeline.errors import MachineError
from tests.support.hostile import Damage, all_of, every, of_file, of_json, try_all, with_content

START = {
    "event": "start",
    "time": 1.0,
    "world_size": 1,
    "facts": {"num_parameters": 9, "device": "cpu"},
}
STEP = {
    "step": 1, "tokens": 64, "train/loss": 1.5, "train/lr": 1e-3, "train/grad_norm": 1.0,
    "throughput/tokens_per_sec": 9.0, "resilience/restarts": 0, "resilience/skipped_steps": 0,
    "goodput/goodput": 0.5, "goodput/lost_steps": 0.0, "val/web/loss": 1.0, "val/web/ppl": 2.7,
    "val/web/bits_per_byte": 0.5,
}  # fmt: skip
FINAL = {"results": {"web": {"loss": 1.0, "ppl": 2.7, "bits_per_byte": 0.5, "tokens": 9}}}
ATTEMPT = {
    "started_at": 1.0,
    "updated_at": 2.0,
    "first_step": 0,
    "last_step": 1,
    "seconds": {"train": 1.0},
}
CLAIM = {
    "node": "n", "pid": 1, "process_start": "1", "machine": "m", "job_id": None, "restart": 0, "since": "x",
    "token": "t", "released": True,
}  # fmt: skip


def run_folder(folder: Path) -> Path:
    """What a run leaves, without its checkpoints."""
    (folder / "owner").mkdir(parents=True)
    (folder / "logs/attempts").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: x\n")
    (folder / "metrics.jsonl").write_text(f"{json.dumps(START)}\n{json.dumps(STEP)}\n")
    (folder / "evaluation.json").write_text(json.dumps(FINAL))
    (folder / "owner/00000001.json").write_text(json.dumps(CLAIM))
    (folder / "logs/attempts/0000.json").write_text(json.dumps(ATTEMPT))
    (folder / "wandb-id").write_text("abc")
    (folder / "wandb-told.json").write_text('{"train/loss": 1}')
    return folder


def use_run_folder(folder: Path) -> None:
    """What the next start of the run and pipeline.report do with it."""
    from pipeline import report
    from pipeline.resilience import ownership
    from pipeline.resilience.clock import Clock
    from pipeline.resilience.goodput import Goodput
    from pipeline.tracking.feed import Feed
    from pipeline.tracking.history import has_evaluation, rows_until
    from pipeline.tracking.row_file import RowFile
    from pipeline.tracking.wandb_run import WandbRun, _wandb_id

    def count() -> None:
        goodput = Goodput(folder, Clock())
        goodput.begin(1)
        assert goodput.write(2)["goodput/restarts"] >= 0

    def identify() -> None:
        with contextlib.suppress(OSError):  # the thread of W&B warns
            assert _wandb_id(folder)

    def tell() -> None:
        with contextlib.suppress(OSError):
            Feed(WandbRun(TrackingConfig(), run_dir=folder, config={}))._read_mark()
        assert all(row.at.step <= 9 for row in rows_until(folder / "metrics.jsonl", 9))

    def append() -> None:
        rows = RowFile(folder / "metrics.jsonl")
        rows.append(b"{}\n")
        rows.close()

    all_of(
        lambda: report.main(report.ReportConfig(run=str(folder))),
        lambda: has_evaluation(folder, 1, names=["web"]) in (True, False),
        count,
        append,
        lambda: ownership.problem(folder, node="here"),
        lambda: ownership.claim(folder, node="here"),
        identify,
        tell,
    )


def test_run_folders(tmp_path, outside, monkeypatch, capsys):
    """Nor does anything but the report end for what only tells of a run."""
    pytest.importorskip("matplotlib")
    from pipeline.resilience import ownership
    from pipeline.tracking import curves

    monkeypatch.setattr(ownership, "SILENCE_S", 0.0)
    monkeypatch.setattr(ownership, "BEAT_S", 0.0)
    pictures = []  # each takes seconds to draw, and 400 of them show nothing new

    def draw(*arguments: Any, **options: Any) -> curves.Pictures:
        drawn = (
            curves.draw(*arguments, **options) if len(pictures) < 3 else curves.Pictures(b"", {})
        )
        pictures.append(drawn)
        return drawn

    monkeypatch.setattr("pipeline.report.draw", draw)
    valid = run_folder(tmp_path / "valid")

    def cases() -> Iterator[tuple[str, str, Damage]]:
        files = [str(p.relative_to(valid)) for p in sorted(valid.rglob("*")) if p.is_file()]
        yield from every(files, of_file(outside))
        for row in (START, STEP):
            for name, damage in of_json(row, write=write_line):
                yield "metrics.jsonl", name, damage
        for file, content in [("evaluation.json", FINAL), ("owner/00000001.json", CLAIM),
                              ("logs/attempts/0000.json", ATTEMPT)]:  # fmt: skip
            for name, damage in of_json(content):
                yield file, name, damage
        for name in ("99999999999999999999.json", "999999999999.json", "x.json", "00000002.json"):
            yield f"owner/{name}", "no claim", with_content(b"{}")
            yield f"owner/{name}", "folder", Path.mkdir
            yield f"logs/attempts/{name}", "no attempt", with_content(b"{}")

    try_all(valid, use_run_folder, cases(), least=400)
    assert "\x1b" not in capsys.readouterr().out, "a name commands the terminal"


def write_line(path: Path, row: Any) -> None:
    path.write_text(f"{json.dumps(row)}\n{json.dumps(STEP)}\n")


LINKS = ("report", "logs", "logs/attempts", "owner", "checkpoints", "metrics.jsonl", "new")


@pytest.mark.parametrize("name", LINKS)
def test_a_run_folder_with_links_is_refused(tmp_path, outside, name):
    """Lines would be appended, checkpoints pruned, wherever they lead."""
    from pipeline.files import check_no_links
    from pipeline.training.startup import _check_room

    run = run_folder(tmp_path / "run")
    (run / "wandb").mkdir()
    (run / "wandb/latest-run").symlink_to("nowhere")  # W&B's own, in its own folder
    check_no_links(run)
    (run / "wandb").rename(tmp_path / "wandb")
    (run / "wandb").symlink_to(tmp_path / "wandb")
    check_no_links(run)
    (tmp_path / "link").symlink_to(run)
    _check_room(tmp_path / "link", 1, "runs_dir=...")  # the whole folder may be elsewhere
    shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside.parent)
    with pytest.raises(MachineError, match=f"holds the link {name};"):
        _check_room(run, 1, "runs_dir=...")


def test_rows_are_not_appended_through_a_link(tmp_path, outside):
    """It may be put there while the run goes on: no row goes elsewhere, and the run does not end."""
    from pipeline.tracking.row_file import RowFile

    rows = RowFile(tmp_path / "metrics.jsonl")
    rows.append(b"1\n")
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to(outside)
    rows.append(b"2\n")
    (tmp_path / "metrics.jsonl").unlink()
    rows.append(b"3\n")
    rows.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"2\n3\n"
