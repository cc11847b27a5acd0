"""Who is told of a run that has ended; whoever cannot be told is named before hours of work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, MachineError
from pipeline.resilience import ownership
from pipeline.tracking.afterwards import TrackedRun, run_of
from pipeline.tracking.tracker import At
from tests.support.trackers import Memory

RECORD = json.loads((Path(__file__).parents[1] / "checkpoint" / "checkpoint_v1.json").read_text())


def write_run(run: Path, **tracking: object) -> Path:
    """A run that has trained; its checkpoint has no tensors."""
    checkpoint = run / "checkpoints" / "step-00000008"
    checkpoint.mkdir(parents=True)
    config = {**RECORD["config"], "tracking": {**RECORD["config"]["tracking"], **tracking}}
    (checkpoint / "checkpoint.json").write_text(json.dumps({**RECORD, "config": config}))
    rows = [
        {"event": "start", "time": 1.0, "world_size": 1, "facts": {"host": "a"}},
        {"step": 8, "tokens": 64, "train/loss": 1.0},
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return checkpoint


def test_the_trackers_of_the_run_are_those_it_was_trained_with(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path / "a", wandb="offline", project="mine", tensorboard=True)
    for path in (tmp_path / "a", checkpoint, tmp_path / "a" / "checkpoints" / ".."):
        run = run_of(path)
        assert [tracker.name for tracker in run.trackers] == ["W&B", "TensorBoard"]
        assert run.at[:2] == (RECORD["step"], RECORD["state"]["tokens_seen"])
        wandb = run.trackers[0]
        assert wandb._run_dir == (tmp_path / "a").absolute()
        assert (wandb._cfg.project, wandb._config["facts"]["host"]) == ("mine", "a")


def test_nobody_to_tell_is_said_before_the_work(tmp_path: Path, monkeypatch) -> None:
    is_file = Path.is_file
    write_run(tmp_path / "a", wandb="disabled")
    with pytest.raises(ConfigError, match="track=true has nobody to tell"):
        run_of(tmp_path / "a")
    checkpoint = write_run(tmp_path / "b")
    (tmp_path / "b" / "metrics.jsonl").unlink()
    (tmp_path / "hf" / "x").mkdir(parents=True)
    (tmp_path / "hf" / "x" / "config.json").write_text("{}")
    root = Path("/").joinpath(*tmp_path.parts[1:2])  # a folder that no other one is around
    monkeypatch.setattr(Path, "is_file", lambda path: path == root / "config.json" or is_file(path))
    for path in (checkpoint, tmp_path / "hf" / "x", root):
        with pytest.raises(ConfigError, match="lies in the folder of none"):
            run_of(path)


def test_a_run_that_is_being_trained_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    """Two processes in one W&B run: each would undo the other's summary."""
    write_run(tmp_path / "a", wandb="offline")
    monkeypatch.setattr(ownership, "problem", lambda *_, **__: "in use")
    with pytest.raises(MachineError, match="is being trained"):
        run_of(tmp_path / "a")


def test_a_tracker_that_does_not_take_it_is_an_error_when_it_was_asked_for(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    run = TrackedRun([memory], At(8, 64, 0.0))
    run.tell(lambda tracker, at: tracker.summarize(at, {"evaluation/a/loss": 2.0}))
    assert (memory.summary, memory.exit_code) == ({"evaluation/a/loss": 2.0}, 0)
    memory.is_down = True
    with pytest.raises(MachineError, match="Memory did not take it: ConnectionError"):
        run.tell(lambda tracker, at: tracker.summarize(at, {"evaluation/a/loss": 3.0}))
