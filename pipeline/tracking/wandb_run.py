"""A Weights & Biases run as a tracker; the only importer of wandb."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.choices import WandbMode
from pipeline.config.operation import TrackingConfig
from pipeline.files import read_file, write_durably
from pipeline.log import logger
from pipeline.redaction import redact
from pipeline.tracking.samples import Sample
from pipeline.tracking.tracker import At, Tracker

WANDB_INIT_TIMEOUT_S = 120.0


class WandbRun(Tracker):
    """One W&B run for the job's whole life, whatever happens to W&B's helper process."""

    name = "W&B"
    takes_back = False
    """W&B's own step only grows: of a step that is done again it keeps the first point."""

    def __init__(self, cfg: TrackingConfig, *, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Args: config: what W&B shows of the run's settings, without secrets."""
        self._cfg, self._run_dir, self._config = cfg, run_dir, config
        self.mark = run_dir / "wandb-told.json"  # not in wandb/, which may be pruned after a sync
        self._run: Any = None

    def is_known(self) -> bool:
        """Whether there is an id."""
        return (self._run_dir / "wandb-id").exists()

    def open(self, after: At | None) -> None:
        """Open the run. After a failure its helper process, which may be dead, is replaced."""
        import wandb

        if wandb.run is not None:
            with contextlib.suppress(Exception):
                wandb.teardown()
        mode: Any = _wandb_mode(self._cfg.wandb)
        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=WANDB_INIT_TIMEOUT_S,
            # wandb-metadata.json has the command line as it was typed.
            x_disable_meta=redact(sys.argv) != sys.argv,
        )
        # Offline every restart writes a folder of its own with this id, and `wandb sync` joins
        # them; `resume` means nothing there.
        self._run = run = wandb.init(
            project=self._cfg.project,
            entity=self._cfg.entity,
            group=self._cfg.group,
            tags=self._cfg.tags,
            name=self._run_dir.name,
            dir=self._run_dir,
            id=_wandb_id(self._run_dir),
            resume="allow" if mode == "online" else None,
            mode=mode,
            config=dict(self._config),
            settings=settings,
        )
        where = run.url if mode == "online" else f"{mode}; kept in {self._run_dir}/wandb"
        logger.info("wandb: %s", where)
        # W&B's own step counts rows. Each of these can be chosen as a chart's x-axis.
        run.define_metric("step")
        run.define_metric("tokens")
        run.define_metric("*", step_metric=self._cfg.x_axis.name)

    def log(self, at: At, values: Mapping[str, Any]) -> None:
        """One row of W&B's history."""
        self._run.log({"step": at.step, "tokens": at.tokens, **values})

    def log_samples(self, at: At, samples: Sequence[Sample]) -> None:
        """A table, which W&B puts together over the steps."""
        import wandb

        rows = [[at.step, at.tokens, *sample] for sample in samples]
        table = wandb.Table(columns=["step", "tokens", *Sample._fields], data=rows)
        self.log(at, {"samples": table})

    def summarize(self, at: At, values: Mapping[str, float | None]) -> None:
        """Columns of the table of runs."""
        self._run.summary.update(dict(values))

    def keep_model(self, at: At, folder: Path, facts: Mapping[str, Any]) -> None:
        """An artifact; offline its files stay in `folder` until `wandb sync` takes them there."""
        import wandb

        # W&B's names have letters, digits and these.
        name = re.sub(r"[^\w.-]", "-", self._run_dir.name, flags=re.ASCII)
        artifact = wandb.Artifact(name, type="model", metadata={**at._asdict(), **facts})
        # No copies of it on this disk: neither to be uploaded from, nor in W&B's cache.
        artifact.add_dir(str(folder), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=["latest", f"step-{at.step}"])

    def close(self, exit_code: int) -> None:
        """Finish the run."""
        self._run.finish(exit_code=exit_code)


def _wandb_mode(mode: WandbMode) -> str:
    """Online or offline: the setting, else WANDB_MODE, else online where there is a key."""
    if mode is not WandbMode.auto:
        return mode.name
    return os.environ.get("WANDB_MODE") or (
        "online" if os.environ.get("WANDB_API_KEY") else "offline"
    )


def _wandb_id(run_dir: Path) -> str:
    """The run's W&B id, made on first use and kept in the run folder.

    Raises:
        OSError: there is a file that cannot be read now: another id would split the run in two.
    """
    path = run_dir / "wandb-id"
    try:
        found = read_file(path).decode("ascii", "replace").strip()
    except FileNotFoundError:
        found = ""
    if not re.fullmatch(r"[\w-]{1,64}", found):
        found = uuid.uuid4().hex[:12]
        write_durably(path, found.encode())
    return found
