"""Save and resume at any layout; list, verify, show and compare checkpoints.

    python -m pipeline.checkpoint list runs/NAME          every checkpoint: step, tokens, size
    python -m pipeline.checkpoint verify runs/NAME        read every byte and compare its checksum
    python -m pipeline.checkpoint show runs/NAME          what is in it: record, parameters, shapes
    python -m pipeline.checkpoint diff STEP_A STEP_B      largest difference of every parameter

Save: copy this rank's fragments to host memory (training waits), then, in a background thread, write the files, sync
them, rename the folder, move `latest`, prune. Restore: the newest checkpoint whose checksums hold is read into the
fragments of whatever layout runs now. A failed save is retried, then reported; training goes on.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline import checkpoint_folder as folders
from pipeline import cli
from pipeline.config import CheckpointConfig
from pipeline.errors import CheckpointError
from pipeline.log import logger

if TYPE_CHECKING:
    from pipeline.distributed import ParallelLayout
    from pipeline.engine import Engine

T = TypeVar("T")
ATTEMPTS = 3
RETRY_PAUSE_S = 5.0
SPARE_BYTES = 64 * 2**20
"""Disk space that must be left after a save."""


class Checkpointer:
    """Writes and reads the checkpoints of one run. Methods are collective: call on every rank, in the same order."""

    def __init__(
        self, cfg: CheckpointConfig, *, folder: Path, layout: ParallelLayout, attachments: dict[str, Path] | None = None
    ) -> None:
        """Collective.

        Args:
            folder: runs/<name>/checkpoints, on a file system that every rank sees.
            attachments: file name to file, copied into every checkpoint: tokenizer.json.
        """
        import torch.distributed as dist

        from pipeline.checkpoint_io import HostCopy

        self.cfg, self.folder, self.layout = cfg, folder, layout
        self.attachments = attachments or {}
        self.failed_saves = 0
        """Saves that were given up, on every rank alike."""
        # The background thread talks in a group of its own, so that its messages never meet training's.
        self._group = dist.new_group(backend="gloo")
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._host_copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._last_saved: int | None = None
        self._outcome: str | None = None

    # ---- save ---------------------------------------------------------------------------------------------------

    def save(self, engine: Engine, *, step: int, record: dict[str, Any]) -> float:
        """Milliseconds that training stood still. A step that is on the disk, or on its way, is not written again.

        Args:
            step: optimizer steps done.
            record: JSON-able facts of the trainer; they come back from `restore` as they were.
        """
        if step == self._last_saved:
            return 0.0
        start = time.monotonic()
        self.wait()
        from pipeline import engine_state

        chunks = self._host_copy.take(engine_state.fragments(engine))
        facts = {
            "format": folders.FORMAT,
            "version": folders.VERSION,
            "step": step,
            "optimizer": engine.cfg.optimizer.name.name,
            "optimizer_step": engine_state.optimizer_step(engine),
            "loss_scale": engine.loss_scale.state() if engine.loss_scale else None,
            "vocab_size": engine.run.vocab_size,
            "layout": _layout_facts(self.layout),
            "versions": _versions(),
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **record,
        }
        self._last_saved, self._outcome = step, "the writing thread died"
        self._thread = threading.Thread(
            target=self._write, args=(chunks, step, facts), name="checkpoint-writer", daemon=True
        )
        self._thread.start()
        if not self.cfg.asynchronous:
            self.wait()
        return (time.monotonic() - start) * 1e3

    def wait(self) -> bool:
        """Wait until the last save is on the disk; false when it was given up."""
        if self._thread is None:
            return True
        self._thread.join()
        self._thread = None
        if self._outcome is None:
            return True
        self.failed_saves += 1
        self._last_saved = None
        return False

    def _write(self, chunks: list, step: int, facts: dict[str, Any]) -> None:
        """Body of the background thread; never raises. Collective over the checkpoint group."""
        for attempt in range(ATTEMPTS):
            self._outcome = _first_problem(self._try_write, chunks, step, facts)
            if self._outcome is None:
                return
            if self._rank == 0:
                again = (
                    f"trying again in {RETRY_PAUSE_S:.0f} s" if attempt + 1 < ATTEMPTS else "given up; training goes on"
                )
                logger.error("checkpoint of step %d failed: %s (%s)", step, self._outcome, again)
            if attempt + 1 < ATTEMPTS:
                time.sleep(RETRY_PAUSE_S)

    def _try_write(self, chunks: list, step: int, facts: dict[str, Any]) -> None:
        from pipeline import checkpoint_io

        start, saving = time.monotonic(), folders.saving_folder(self.folder, step)
        size_bytes = sum(self._gather(sum(c.data.nbytes for c in chunks)))
        self._on_main(lambda: self._make_room(saving, size_bytes))
        sums = checkpoint_io.write(chunks, saving, group=self._group)
        sums = {name: digest for part in self._gather(sums) for name, digest in part.items()}
        seconds = time.monotonic() - start
        self._on_main(
            lambda: self._publish(step, {**facts, "size_bytes": size_bytes, "write_s": round(seconds, 3)}, sums)
        )

    def _make_room(self, saving: Path, size_bytes: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        folders.clear_leftovers(self.folder)
        free = shutil.disk_usage(self.folder).free
        if free < size_bytes + SPARE_BYTES:
            raise CheckpointError(
                f"{self.folder} has {free / 2**30:.2f} GiB free, "
                f"the checkpoint needs {(size_bytes + SPARE_BYTES) / 2**30:.2f} GiB"
            )
        saving.mkdir()

    def _publish(self, step: int, record: dict[str, Any], sums: dict[str, str]) -> None:
        saving = folders.saving_folder(self.folder, step)
        attached = {
            name: folders.write_durably(saving / name, path.read_bytes()) for name, path in self.attachments.items()
        }
        final = folders.publish(self.folder, step, record, {**sums, **attached})
        gib = record["size_bytes"] / 2**30
        logger.info("checkpoint %s written: %.2f GiB in %.1f s", final, gib, record["write_s"])
        try:
            folders.prune(self.folder, keep_last=self.cfg.keep_last, keep_every=self.cfg.keep_every)
        except OSError as error:
            logger.warning("old checkpoints could not be deleted: %s", error)

    # ---- restore ------------------------------------------------------------------------------------------------

    def restore(self, engine: Engine, *, not_after: int | None = None) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into the engine; its record, or None when there is none.

        Damaged ones are reported, renamed to damaged-step-..., and the one before is taken.

        Args:
            not_after: ignore checkpoints of later steps.

        Raises:
            CheckpointError: none of the checkpoints is whole, or they are of another model or optimizer.
        """
        from pipeline import checkpoint_restore, engine_state

        self.wait()
        found = self._on_main(
            lambda: [(s, p) for s, p in folders.list_checkpoints(self.folder) if not_after is None or s <= not_after]
        )
        for step, path in reversed(found):
            problems = [
                p for part in self._gather(folders.damage(path, part=self._rank, parts=self._world_size)) for p in part
            ]
            if problems:
                self._on_main(lambda path=path, problems=problems: _report_damage(path, problems))  # type: ignore[misc]
                continue
            record = self._agree(lambda path=path: checkpoint_restore.read_state(engine, path))  # type: ignore[misc]
            engine_state.publish_weights(engine)
            self._last_saved = step
            if self._rank == 0:
                logger.info("resumed from %s", path)
            return record
        if found:
            raise CheckpointError(
                f"all {len(found)} checkpoints in {self.folder} are damaged; they were renamed to damaged-step-... and "
                "kept. Repair one and rename it back, or set checkpoint.resume=false and another name to start again."
            )
        return None

    def load_weights(self, engine: Engine, path: Path) -> Path:
        """Start from the weights of a run, one of its checkpoints, or a Hugging Face folder; the folder that was read.

        Raises:
            CheckpointError: the folder is neither, is damaged, or its model is not this one.
        """
        from pipeline import checkpoint_restore, engine_state

        if (path / "config.json").is_file():
            self._agree(lambda: checkpoint_restore.import_weights(engine, path))
        else:
            path = self._on_main(lambda: folders.find(path))
            parts = self._gather(folders.damage(path, part=self._rank, parts=self._world_size))
            if problems := [problem for part in parts for problem in part]:
                raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}.")
            self._agree(lambda: checkpoint_restore.read_weights(engine, path))
        engine_state.publish_weights(engine)
        return path

    # ---- collectives of the checkpoint group --------------------------------------------------------------------

    def _gather(self, value: T) -> list[T]:
        """`value` of every rank."""
        import torch.distributed as dist

        values: list[Any] = [None] * self._world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _agree(self, function: Callable[[], T]) -> T:
        """function() of this rank; when it raises on any rank, every rank raises."""
        value, problem = None, None
        try:
            value = function()
        except Exception as error:
            problem = _as_checkpoint_error(error)
        if problems := [p for p in self._gather(problem) if p is not None]:
            raise problems[0]
        return value  # type: ignore[return-value]

    def _on_main(self, function: Callable[[], T]) -> T:
        """function() of rank 0, on every rank; so is its exception."""
        import torch.distributed as dist

        box: list[Any] = [None, None]
        if self._rank == 0:
            try:
                box[0] = function()
            except Exception as error:
                box[1] = _as_checkpoint_error(error)
        dist.broadcast_object_list(box, src=0, group=self._group)
        if box[1] is not None:
            raise box[1]
        return box[0]


def _report_damage(path: Path, problems: list[str]) -> None:
    kept = folders.set_aside(path)
    logger.error("checkpoint %s is DAMAGED and not used: %s. Kept as %s.", path, "; ".join(problems[:5]), kept.name)


def _as_checkpoint_error(error: Exception) -> CheckpointError:
    """An exception that travels between ranks."""
    return error if isinstance(error, CheckpointError) else CheckpointError(f"{type(error).__name__}: {error}")


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
        "tensor_parallel_size": layout.tensor_parallel_size,
        "pipeline_parallel_size": layout.pipeline_parallel_size,
        "data_parallel_size": layout.data_parallel_size,
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "megatron-core")}


# ---- command line -----------------------------------------------------------------------------------------------


@dataclass
class ToolConfig:
    """Look at checkpoints."""

    command: str = "list"
    """list, verify, show, or diff."""
    path: str = "???"
    """A run folder, a checkpoints folder, or one checkpoint."""
    other: str | None = None
    """diff: the second checkpoint."""


def main(cfg: ToolConfig) -> int:
    """Run one of the tools; exit code 1 when verify finds damage or diff a difference."""
    from pipeline import checkpoint_tools as tools

    commands = {"list": tools.list_all, "verify": tools.verify, "show": tools.show}
    if cfg.command == "diff":
        if cfg.other is None:
            raise CheckpointError(
                "diff compares two checkpoints: python -m pipeline.checkpoint diff CHECKPOINT_A CHECKPOINT_B."
            )
        return tools.diff(Path(cfg.path), Path(cfg.other))
    if cfg.command not in commands:
        raise CheckpointError(f"'{cfg.command}' is not a command. Commands: {', '.join([*commands, 'diff'])}.")
    return commands[cfg.command](Path(cfg.path))


if __name__ == "__main__":
    cli.run(main, ToolConfig, config="checkpoint", positional=("command", "path", "other"))
