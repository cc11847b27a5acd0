"""A run that has ended, told more of: a whole evaluation, an exported model (`track=true`).

checkpoint --run_of--> its trackers, as it was trained with --tell--> the same W&B run, TensorBoard
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.record import read_record
from pipeline.errors import ConfigError, DataError, MachineError
from pipeline.resilience import ownership
from pipeline.tracking.history import History
from pipeline.tracking.tracker import At, Tracker
from pipeline.tracking.trackers import trackers_of


class TrackedRun(NamedTuple):
    """Who is told, and of which step."""

    trackers: list[Tracker]
    at: At

    def tell(self, tell_one: Callable[[Tracker, At], None]) -> None:
        """Tell each tracker, and wait until all is taken.

        Raises:
            MachineError: one of them did not take it.
        """
        for tracker in self.trackers:
            try:
                tracker.open(None)
                tell_one(tracker, self.at)
                tracker.close(0)
            except Exception as error:
                raise MachineError(
                    f"{tracker.name} did not take it: {type(error).__name__}: {error}. All else is "
                    "done; try again, or leave track=true out."
                ) from error


def run_of(path: Path) -> TrackedRun:
    """The trackers of the run that a checkpoint belongs to; nothing is opened.

    Args:
        path: runs/NAME, or a checkpoint in it.

    Raises:
        ConfigError: it is in no run's folder, or the run has no tracker.
        MachineError: the run is being trained: two processes would write to one run of a tracker.
    """
    is_ours = not (path / "config.json").is_file()  # else a Hugging Face folder
    checkpoint = folders.find(path) if is_ours else path
    # Words alone: `..` would be the name of the run, and one at the root has no second parent.
    run_dir = Path(os.path.abspath(checkpoint)).parent.parent
    try:
        facts = History.load(run_dir).facts if is_ours else None
    except DataError:
        facts = None
    if facts is None:
        raise ConfigError(
            f"track=true tells the trackers of a run, and {path} lies in the folder of none "
            "(runs/NAME, with metrics.jsonl). Leave it out."
        )
    record = read_record(checkpoint)
    config = {**record.config, "facts": facts}
    trackers = trackers_of(record.tracking(), run_dir=run_dir, config=config)
    if not trackers:
        raise ConfigError(
            f"track=true has nobody to tell: {run_dir} was trained with tracking.wandb=disabled "
            "and without tracking.tensorboard. Leave it out."
        )
    if ownership.problem(run_dir, node=socket.gethostname()):
        raise MachineError(
            f"{run_dir} is being trained, and two processes in one run of a tracker would undo "
            "each other's work. Wait for its end, or leave track=true out."
        )
    return TrackedRun(trackers, At(record.step, record.tokens_seen, time.time()))
