"""All trackers of a run: the one place that knows which there are, and what each is told.

TrackingConfig --trackers_of--> W&B, TensorBoard
training: Metrics --> Trackers --> a Feed each, which fails without harm
once it has ended: afterwards.py, the same run in the same libraries
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.choices import WandbMode
from pipeline.config.operation import TrackingConfig
from pipeline.redaction import redact
from pipeline.tracking.feed import Feed
from pipeline.tracking.held_out import BEST, Evaluations
from pipeline.tracking.samples import Sample
from pipeline.tracking.tensorboard_run import TensorboardRun
from pipeline.tracking.tracker import At, Row, Tracker
from pipeline.tracking.wandb_run import WandbRun


def trackers_of(cfg: TrackingConfig, *, run_dir: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Those that the settings ask for; nothing is opened.

    Args:
        cfg: the tracking section.
        run_dir: runs/<name>; its last part names the run.
        config: settings and facts, to be shown; secrets are taken out here.
    """
    found: list[Tracker] = []
    config = redact(dict(config))
    if cfg.wandb is not WandbMode.disabled:
        found.append(WandbRun(cfg, run_dir=run_dir, config=config))
    if cfg.tensorboard:
        found.append(TensorboardRun(cfg.x_axis, run_dir=run_dir, config=config))
    return found


class Trackers:
    """What a run that trains tells its trackers. Nothing here fails; only `close` waits."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        """Of `trackers_of`."""
        self.feeds = [Feed(tracker) for tracker in trackers]
        self._evaluations = Evaluations()

    def begin(self, at: At, past: Sequence[Row]) -> None:
        """The run goes on here; `past` is what it has logged up to there, ascending."""
        for row in past:
            self._evaluations.take(row)
        for feed in self.feeds:
            feed.begin(at, past)

    def log(self, at: At, values: Mapping[str, Any]) -> None:
        """Values by metric name."""
        row = Row(at, dict(values))
        self._evaluations.take(row)
        for feed in self.feeds:
            feed.log(row)

    def log_samples(self, at: At, samples: Sequence[Sample]) -> None:
        """What the model wrote."""
        for feed in self.feeds:
            feed.log_samples(at, samples)

    def rewind(self, at: At) -> None:
        """The run is back here, and does what follows anew on other samples."""
        had_best = bool(self._evaluations.best())
        self._evaluations.forget_after(at.step)
        for feed in self.feeds:
            feed.rewind(at)
        nothing = dict.fromkeys(BEST) if had_best else {}
        self.summarize(at, self._evaluations.best() or nothing)

    def evaluated(self, at: At) -> None:
        """All datasets of an evaluation have been logged."""
        self.summarize(at, self._evaluations.best())

    def finish(self, at: At) -> None:
        """The run has done its last step."""
        self.summarize(at, self._evaluations.final(at))

    def summarize(self, at: At, values: Mapping[str, float | None]) -> None:
        """What is said of the whole run, None what is not so any more; nothing without values."""
        for feed in self.feeds if values else []:
            feed.summarize(at, values)

    def close(self, exit_code: int) -> None:
        """End all of them."""
        for feed in self.feeds:
            feed.close(exit_code)
