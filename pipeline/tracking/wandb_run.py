"""A Weights & Biases run behind a queue on a thread of its own; the only importer of wandb.

A server that is slow, gone or wrong costs warnings, never a step.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import uuid
from pathlib import Path
from typing import Any

from pipeline.config.choices import WandbMode
from pipeline.config.operation import TrackingConfig
from pipeline.files import write_durably
from pipeline.log import logger

WANDB_INIT_TIMEOUT_S = 120.0
WANDB_CLOSE_TIMEOUT_S = 60.0  # what a run waits at its end for W&B to take the last values
WANDB_QUEUE = 10_000  # values kept for a W&B that does not take them


class WandbRun:
    """A W&B run, opened and fed by a thread of its own; whatever fails there is one warning."""

    def __init__(self, cfg: TrackingConfig, *, run_dir: Path, config: dict[str, Any]):
        self._queue: queue.Queue[dict[str, Any] | int] = queue.Queue(WANDB_QUEUE)
        self._broken = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(cfg, run_dir, config), daemon=True, name="wandb"
        )
        self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        """Hand over one row; never waits."""
        if not self._broken.is_set():
            try:
                self._queue.put_nowait(row)
            except queue.Full:
                self._give_up(f"{WANDB_QUEUE} values wait for it")

    def close(self, exit_code: int) -> None:
        """Finish the W&B run with the exit code; waits WANDB_CLOSE_TIMEOUT_S at most."""
        if not self._broken.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(exit_code)
            self._thread.join(WANDB_CLOSE_TIMEOUT_S)
            if self._thread.is_alive():
                self._give_up(f"it did not finish within {WANDB_CLOSE_TIMEOUT_S:.0f} s")

    def _work(self, cfg: TrackingConfig, run_dir: Path, config: dict[str, Any]) -> None:
        """The thread: open the run, send what the queue brings; its failure is one warning."""
        try:
            import wandb

            mode: Any = _wandb_mode(cfg.wandb)
            settings = wandb.Settings(console="off", silent=True, init_timeout=WANDB_INIT_TIMEOUT_S)
            # One run for the job's whole life. Offline every restart writes a folder of its own
            # with this id, and `wandb sync` joins them; `resume` means nothing there.
            run = wandb.init(
                project=cfg.project,
                entity=cfg.entity,
                group=cfg.group,
                tags=cfg.tags,
                name=run_dir.name,
                dir=run_dir,
                id=_wandb_id(run_dir),
                resume="allow" if mode == "online" else None,
                mode=mode,
                config=config,
                settings=settings,
            )
            logger.info(
                "wandb: %s", run.url if mode == "online" else f"{mode}; kept in {run_dir}/wandb"
            )
            # After a restart steps repeat: W&B's own step cannot.
            run.define_metric("*", step_metric="step")
            while isinstance(row := self._queue.get(), dict):
                run.log(row)
            run.finish(exit_code=row)
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        if not self._broken.is_set():
            self._broken.set()
            logger.warning(
                "W&B is given up, training goes on and metrics.jsonl has everything: %s", reason
            )


def _wandb_mode(mode: WandbMode) -> str:
    """Online or offline: the setting, else WANDB_MODE, else online where there is a key."""
    if mode is not WandbMode.auto:
        return mode.name
    return os.environ.get("WANDB_MODE") or (
        "online" if os.environ.get("WANDB_API_KEY") else "offline"
    )


def _wandb_id(run_dir: Path) -> str:
    """The run's W&B id, made on first use and kept in the run folder."""
    path = run_dir / "wandb-id"
    if not path.exists():
        write_durably(path, uuid.uuid4().hex[:12].encode())
    return path.read_text().strip()
