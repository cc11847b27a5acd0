"""Save and resume at any layout.

Save: copy this rank's fragments to host memory (training waits), then, in a background thread,
write the files, sync them, rename the folder, move `latest`, prune. Restore: the newest checkpoint
whose checksums hold is read into the fragments of whatever layout runs now. A failed save is
tried again, then in the fallback folder, then reported; training goes on, until
checkpoint.max_failed_saves in a row have failed.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.agreement import Agreement
from pipeline.checkpoint.record import CheckpointRecord, RunRecord
from pipeline.config.operation import CheckpointConfig
from pipeline.errors import CheckpointError
from pipeline.files import write_durably
from pipeline.log import in_units, logger
from pipeline.resilience.bookkeeping import bookkeeping

if TYPE_CHECKING:
    from pipeline.distributed.layout import ParallelLayout
    from pipeline.engine.engine import Engine

T = TypeVar("T")
ATTEMPTS = 3
RETRY_PAUSE_S = 5.0
SPARE_BYTES = 64 * 2**20
"""Disk space that must be left after a save."""


class Checkpointer:
    """Writes and reads the checkpoints of one run. Collective: call every method on every rank."""

    def __init__(
        self,
        cfg: CheckpointConfig,
        *,
        folder: Path,
        layout: ParallelLayout,
        fallback: Path | None = None,
        attachments: dict[str, bytes] | None = None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """Collective.

        Args:
            folder: runs/<name>/checkpoints, on a file system that every rank sees.
            fallback: another such folder, for what `folder` does not take.
            attachments: file name to content, written into every checkpoint: tokenizer.json, and
                the chat template that the data were rendered by.
            alive: called while training waits for a save that begins another try.
        """
        import torch.distributed as dist

        from pipeline.checkpoint.tensors import HostCopy

        self.cfg, self.layout = cfg, layout
        self.places = [folder, *([fallback] if fallback else [])]
        self.attachments = attachments or {}
        self.failed_saves = 0
        """Saves that were given up, on every rank alike."""
        self._failed_in_a_row = self._tries = 0
        self._alive = alive
        # The background thread talks in a group of its own, so that its messages never meet
        # training's.
        self._ranks = Agreement(dist.new_group(backend="gloo"))
        # The cores of a node, shared by its ranks; four fill the memory's channels of a socket.
        cores = len(os.sched_getaffinity(0)) // layout.ranks.local_world_size
        self._host_copy = HostCopy(num_threads=min(4, max(1, cores)))
        self._thread: threading.Thread | None = None
        self._last_saved: int | None = None
        self._outcome: str | None = None

    # ---- save ------------------------------------------------------------------------------------

    def save(self, engine: Engine, *, step: int, run: RunRecord) -> float:
        """Write a checkpoint; returns the milliseconds that training stood still.

        A step that is on the disk, or on its way, is not written again.

        Args:
            step: optimizer steps done.
            run: facts of the trainer; they come back from `restore` as they were.
        """
        if step == self._last_saved:
            return 0.0
        start = time.monotonic()
        self.wait()
        from pipeline.engine import state

        chunks = self._host_copy.take(state.fragments(engine))
        record = CheckpointRecord(
            **vars(run),
            step=step,
            optimizer=engine.optimizer_name,
            optimizer_step=state.optimizer_step(engine),
            loss_scale=engine.loss_scale.state() if engine.loss_scale else None,
            vocab_size=engine.shape.vocab_size,
            layout=_layout_facts(self.layout),
            versions=_versions(),
            saved_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        self._last_saved, self._outcome = step, "the writing thread died"
        self._thread = threading.Thread(
            target=self._write, args=(chunks, record), name="checkpoint-writer", daemon=True
        )
        self._thread.start()
        if not self.cfg.asynchronous:
            self.wait()
        return (time.monotonic() - start) * 1e3

    def wait(self) -> bool:
        """Wait until the last save is on the disk; false when it was given up.

        Raises:
            CheckpointError: on every rank, when max_failed_saves in a row were given up.
        """
        if self._thread is not None:
            seen = None
            while True:
                self._thread.join(1.0)
                if not self._thread.is_alive():
                    break
                if self._tries != seen:  # another try is progress; one that hangs is not
                    seen = self._tries
                    self._alive()
            self._thread = None
            self._count()
        return self._outcome is None

    def _count(self) -> None:
        """Take in the outcome of a save, which all ranks know alike."""
        if self._outcome is None:
            self._failed_in_a_row = 0
            return
        self.failed_saves += 1
        self._failed_in_a_row += 1
        step, self._last_saved = self._last_saved, None
        if self._failed_in_a_row >= self.cfg.max_failed_saves:
            raise CheckpointError(
                f"{self._failed_in_a_row} checkpoints in a row could not be written to "
                f"{' or '.join(map(str, self.places))}, the last of step {step}: {self._outcome}. "
                "Training ends (checkpoint.max_failed_saves); the same command goes on at the "
                "newest that is there. Free the disk, or set checkpoint.fallback_dir to a folder "
                "on another one."
            )

    def _write(self, chunks: list, record: CheckpointRecord) -> None:
        """Body of the background thread; never raises. Collective over the checkpoint group."""
        ways = [(root, attempt) for root in self.places for attempt in range(ATTEMPTS)]
        for number, (root, attempt) in enumerate(ways, start=1):
            self._tries += 1
            self._outcome = _first_problem(self._try_write, root, chunks, record)
            if self._outcome is None:
                return
            is_retry = attempt + 1 < ATTEMPTS
            if is_retry:
                then = f"trying again in {RETRY_PAUSE_S:.0f} s"
            elif number < len(ways):
                then = f"trying {ways[number][0]}"
            else:
                then = "given up"
            if self._ranks.rank == 0:
                logger.error(
                    "checkpoint of step %d failed: %s (%s)", record.step, self._outcome, then
                )
            # What was half written would keep the disk full for everybody.
            _first_problem(self._ranks.on_main, partial(folders.clear_leftovers, root))
            if is_retry:
                time.sleep(RETRY_PAUSE_S)

    def _try_write(self, root: Path, chunks: list, record: CheckpointRecord) -> None:
        """Write, publish and prune one checkpoint, once. Collective."""
        from pipeline.checkpoint import tensors

        start, saving = time.monotonic(), folders.saving_folder(root, record.step)
        size_bytes = sum(self._ranks.gather(sum(c.data.nbytes for c in chunks)))
        self._ranks.on_main(lambda: _make_room(root, saving, size_bytes))
        sums = tensors.write(chunks, saving, ranks=self._ranks)
        sums = {name: digest for part in self._ranks.gather(sums) for name, digest in part.items()}
        seconds = round(time.monotonic() - start, 3)
        record = replace(record, size_bytes=size_bytes, write_s=seconds)
        self._ranks.on_main(lambda: self._publish(root, record, sums))

    def _publish(self, root: Path, record: CheckpointRecord, sums: dict[str, str]) -> None:
        """Add the attachments, give the folder its name, prune; on the main rank only."""
        saving = folders.saving_folder(root, record.step)
        attached = {
            name: write_durably(saving / name, content)
            for name, content in self.attachments.items()
        }
        final = folders.publish(root, record, {**sums, **attached})
        size = in_units(record.size_bytes)
        logger.info("checkpoint %s: %s in %.1f s", final, size, record.write_s)
        with bookkeeping(f"deleting old checkpoints of {root}"):
            folders.prune(
                root,
                written=record.step,
                keep_last=self.cfg.keep_last,
                keep_every=self.cfg.keep_every,
            )

    # ---- restore ---------------------------------------------------------------------------------

    def restore(self, engine: Engine, *, not_after: int | None = None) -> CheckpointRecord | None:
        """Load the newest whole checkpoint into the engine; its record, or None when there is none.

        Damaged ones are reported, renamed to damaged-step-..., and the one before is taken.

        Args:
            not_after: ignore checkpoints of later steps.

        Raises:
            CheckpointError: none of the checkpoints is whole, or they are of another model or
                optimizer.
        """
        from pipeline.checkpoint import restore

        self.wait()
        found = self._ranks.on_main(
            lambda: [
                (s, p)
                for s, p in folders.list_places(self.places)
                if not_after is None or s <= not_after
            ]
        )
        for step, path in reversed(found):
            problems, record = self._ranks.read_checked(
                path, partial(restore.read_state, engine, path)
            )
            if problems:  # what was read of it, the one before replaces
                self._ranks.on_main(partial(_report_damage, path, problems))
                continue
            engine.publish_weights()
            self._last_saved, self._outcome = step, None  # an earlier save's failure is settled
            if self._ranks.rank == 0:
                logger.info("resumed from %s", path)
            return record
        if found:
            raise CheckpointError(
                f"all {len(found)} checkpoints in {self.places[0]} are damaged; they were renamed "
                "to damaged-step-... and kept. Repair one and rename it back, or set "
                "checkpoint.resume=false and another name to start again."
            )
        return None


def _make_room(root: Path, saving: Path, size_bytes: int) -> None:
    """An empty `saving` folder on a disk that has room for the checkpoint."""
    root.mkdir(parents=True, exist_ok=True)
    folders.clear_leftovers(root)
    free = shutil.disk_usage(root).free
    if free < size_bytes + SPARE_BYTES:
        raise CheckpointError(
            f"{root} has {in_units(free)} free, "
            f"the checkpoint needs {in_units(size_bytes + SPARE_BYTES)}"
        )
    saving.mkdir()


def _report_damage(path: Path, problems: list[str]) -> None:
    kept = folders.set_aside(path)
    logger.error(
        "checkpoint %s is DAMAGED and not used: %s. Kept as %s.",
        path,
        "; ".join(problems[:5]),
        kept.name,
    )


def _first_problem(function: Callable[..., None], *args: Any) -> str | None:
    """What function(*args) raised, in words; None when nothing."""
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _layout_facts(layout: ParallelLayout) -> dict[str, int]:
    return {
        "world_size": layout.ranks.world_size,
        "tensor_parallel_size": layout.tensor.size,
        "context_parallel_size": layout.context.size,
        "pipeline_parallel_size": layout.pipeline.size,
        "data_parallel_size": layout.data.size,
    }


def _versions() -> dict[str, str]:
    return {
        name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "megatron-core")
    }
