"""Where the time of a run goes: one file per start of the run, and the account over all of them.

    Clock --enter("data", step)--> seconds per phase --Goodput.write--> logs/attempts/0003.json

Goodput is the share of wall time, queueing between two starts included, that became training
progress which was not lost again: steps done after the last checkpoint before a crash count as
lost. Standard library only.
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

from pipeline.files import parse_json, read_file, whole_file
from pipeline.log import logger
from pipeline.resilience.bookkeeping import bookkeeping
from pipeline.resilience.clock import Clock
from pipeline.shapes import COUNT, misfits

ATTEMPT = {
    "started_at": float,
    "updated_at": float,
    "first_step": COUNT,
    "last_step": COUNT,
    "seconds": {str: float},
}
_NAME = re.compile(r"[0-9]{4,9}\.json")


class Goodput:
    """The run's account over all its starts; rank 0 keeps it."""

    def __init__(self, run_dir: Path, clock: Clock) -> None:
        self.clock, self.first_step = clock, 0
        folder = run_dir / "logs" / "attempts"
        paths = sorted(path for path in folder.glob("*.json") if _NAME.fullmatch(path.name))
        self.earlier = [found for path in paths if (found := _read(path)) is not None]
        number = int(paths[-1].stem) + 1 if paths else 0
        self.path = folder / f"{number:04d}.json"

    def begin(self, step: int) -> None:
        """This start goes on from `step`."""
        self.first_step = step
        self.write(step)

    def write(self, step: int) -> dict[str, float]:
        """Record that `step` steps are done; the account so far, by metric name."""
        attempt = {
            "started_at": self.clock.started_at,
            "updated_at": time.time(),
            "first_step": self.first_step,
            "last_step": step,
            "seconds": {phase: round(seconds, 3) for phase, seconds in self.clock.seconds.items()},
        }
        # Not synced: it is on the way between two steps.
        with bookkeeping(str(self.path)), whole_file(self.path, durable=False) as file:
            file.write(json.dumps(attempt).encode())
        return {
            f"goodput/{name}": value for name, value in summary([*self.earlier, attempt]).items()
        }


def _read(path: Path) -> dict[str, Any] | None:
    """An earlier attempt; None, and a warning, when the file is none.

    Empty is what a power cut leaves of a file that was not synced; the account loses that start.
    """
    try:
        content = parse_json(read_file(path))
        if wrong := next(misfits(content, ATTEMPT), None):
            raise ValueError(wrong)
    except (OSError, ValueError) as error:
        logger.warning("%s is passed over, goodput does without it: %r", path, error)
        return None
    return cast("dict[str, Any]", content)


def summary(attempts: list[dict[str, Any]]) -> dict[str, float]:
    """Goodput over the starts of a run, in order.

    lost_steps: steps that a later start had to do again. lost_<phase>_s: seconds not spent on
        training.
    """
    productive, lost_steps = 0.0, 0
    lost: dict[str, float] = defaultdict(float)
    for attempt, later in zip(attempts, [*attempts[1:], None]):
        done = attempt["last_step"] - attempt["first_step"]
        again = max(0, attempt["last_step"] - later["first_step"]) if later else 0
        trained = attempt["seconds"].get("train", 0.0)
        repeated = trained * min(1.0, again / done) if done > 0 else trained
        productive += trained - repeated
        lost_steps += again
        lost["repeated"] += repeated
        lost["down"] += max(0.0, later["started_at"] - attempt["updated_at"]) if later else 0.0
        for phase, seconds in attempt["seconds"].items():
            if phase != "train":
                lost[phase.replace("-", "_")] += seconds
    total = attempts[-1]["updated_at"] - attempts[0]["started_at"]
    return {
        "goodput": productive / total if total > 0 else 0.0,
        "lost_steps": float(lost_steps),
        "restarts": float(len(attempts) - 1),
        **{f"lost_{name}_s": seconds for name, seconds in sorted(lost.items())},
    }
