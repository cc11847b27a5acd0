"""A Weights & Biases run behind a queue on a thread of its own; the only importer of wandb.

A server that is slow, gone or wrong costs warnings, never a step.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import sys
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.choices import WandbMode
from pipeline.config.operation import TrackingConfig
from pipeline.files import read_file, write_durably
from pipeline.log import logger
from pipeline.redaction import redact
from pipeline.resilience.bookkeeping import bookkeeping
from pipeline.tracking.samples import Sample

WANDB_INIT_TIMEOUT_S = 120.0
WANDB_CLOSE_TIMEOUT_S = 60.0  # what a run waits at its end for W&B to take the last values
WANDB_QUEUE = 10_000  # rows kept for a W&B that does not take them; later ones are lost to it
WANDB_PAUSE_S, WANDB_LONGEST_PAUSE_S = 30.0, 3600.0  # before W&B is tried again; doubles


class WandbRun:
    """A W&B run, opened and fed by a thread of its own; when it fails it is opened again later."""

    def __init__(self, cfg: TrackingConfig, *, run_dir: Path, config: dict[str, Any]):
        self._cfg, self._run_dir, self._config = cfg, run_dir, config
        self._queue: queue.Queue[dict[str, Any] | int] = queue.Queue(WANDB_QUEUE)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="wandb")
        self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        """Hand over one row; never waits."""
        with bookkeeping("W&B's queue, full", errors=queue.Full):
            self._queue.put_nowait(row)

    def log_samples(self, at: dict[str, int], samples: Sequence[Sample]) -> None:
        """Hand over the samples of a step, `at`: W&B shows them as a table."""
        rows: list[list[Any]] = [[*at.values(), *sample] for sample in samples]
        self.log({**at, "samples": _Table([*at, *Sample._fields], rows)})

    def close(self, exit_code: int) -> None:
        """Finish the W&B run with the exit code; waits WANDB_CLOSE_TIMEOUT_S at most."""
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(exit_code)
        self._thread.join(WANDB_CLOSE_TIMEOUT_S)
        if waiting := self._queue.qsize() or self._thread.is_alive():
            logger.warning(
                "W&B did not take the last %d values within %.0f s; metrics.jsonl has everything",
                waiting,
                WANDB_CLOSE_TIMEOUT_S,
            )

    def _work(self) -> None:
        """The thread: open the run and send what the queue brings, again after every failure."""
        pause_s, is_done = WANDB_PAUSE_S, False
        while not is_done:
            # At the end there is time for one try: not for the one that the end came upon.
            is_last = self._closing.is_set()
            with bookkeeping("W&B, while metrics.jsonl has everything", errors=Exception):
                self._send(self._open())
                is_last = True
            is_done = is_last
            if not is_done:
                self._closing.wait(pause_s)
                pause_s = min(2 * pause_s, WANDB_LONGEST_PAUSE_S)

    def _send(self, run: Any) -> None:
        """Pass on what the queue brings, to the exit code, which is its last."""
        is_done = False
        while not is_done:
            item = self._queue.get()
            try:
                if isinstance(item, dict):
                    run.log({key: _as_wandb(value) for key, value in item.items()})
                else:
                    run.finish(exit_code=item)
                    is_done = True
            except Exception:
                self._put_back(item)
                raise

    def _put_back(self, item: dict[str, Any] | int) -> None:
        """W&B did not take it: it comes first when W&B is back."""
        with self._queue.mutex:
            self._queue.queue.appendleft(item)

    def _open(self) -> Any:
        """The W&B run. After a failure its helper process, which may be dead, is replaced."""
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
        # One run for the job's whole life. Offline every restart writes a folder of its own
        # with this id, and `wandb sync` joins them; `resume` means nothing there.
        run = wandb.init(
            project=self._cfg.project,
            entity=self._cfg.entity,
            group=self._cfg.group,
            tags=self._cfg.tags,
            name=self._run_dir.name,
            dir=self._run_dir,
            id=_wandb_id(self._run_dir),
            resume="allow" if mode == "online" else None,
            mode=mode,
            config=self._config,
            settings=settings,
        )
        where = run.url if mode == "online" else f"{mode}; kept in {self._run_dir}/wandb"
        logger.info("wandb: %s", where)
        # After a restart steps repeat: W&B's own step cannot.
        run.define_metric("*", step_metric="step")
        return run


class _Table(NamedTuple):
    """A table that waits in the queue: wandb is imported by the thread alone."""

    columns: list[str | int]
    rows: list[Any]
    """Lists of values."""


def _as_wandb(value: Any) -> Any:
    """A value as W&B takes it."""
    import wandb

    return wandb.Table(columns=value.columns, data=value.rows) if type(value) is _Table else value


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
