"""Traces of chosen steps, one file a rank, for https://ui.perfetto.dev and pytorch.org/memory_viz.

training.profile_steps=[a, b] --> runs/NAME/profiles/steps-a-b/rank-00000.trace.json.gz
--> on CUDA also rank-00000.memory.pickle
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.log import logger
from pipeline.resilience.bookkeeping import bookkeeping
from pipeline.tracking.report_page import PROFILES

MEMORY_EVENTS = 200_000  # allocations with their stacks; some steps of a large model


class StepProfile:
    """Traces some steps of this rank; what cannot be written does not end the run."""

    def __init__(
        self, run_dir: Path, *, first: int, last: int, global_rank: int, device: torch.device
    ) -> None:
        """Args: first, last: steps as they are logged, from 1; both are traced."""
        self.first, self.last = first, last
        self.folder = run_dir / PROFILES / f"steps-{first}-{last}"
        self.stem = f"rank-{global_rank:05d}"
        self.is_main, self.on_cuda = global_rank == 0, device.type == "cuda"
        self._profiler: profile | None = None

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Optimizer step `step`, from 0: it is traced if it is one of the chosen."""
        number = step + 1
        if self._profiler is None and self.first <= number <= self.last:
            with bookkeeping("tracing", errors=Exception):
                self._profiler = self._start()
        yield
        if self._profiler is not None and number >= self.last:
            self._finish(self._profiler)
            self._profiler = None

    def _start(self) -> profile:
        """Begin to record, on CUDA also every allocation."""
        if self.on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_cuda else [])]
        profiler = profile(activities=kinds, profile_memory=True)
        profiler.start()
        return profiler

    def _finish(self, profiler: profile) -> None:
        """Write what was recorded, each file whole or not at all."""
        with bookkeeping(str(self.folder), errors=Exception):
            if self.on_cuda:
                torch.cuda.synchronize()
            profiler.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write("trace.json.gz", profiler.export_chrome_trace)
            if self.on_cuda:
                self._write("memory.pickle", torch.cuda.memory._dump_snapshot)
        if self.on_cuda:
            torch.cuda.memory._record_memory_history(enabled=None)
        if self.is_main:
            logger.info("traces of steps %d to %d: %s", self.first, self.last, self.folder)

    def _write(self, ending: str, export: Callable[[str], object]) -> None:
        path = self.folder / f"{self.stem}.{ending}"
        unfinished = path.with_name(f".{path.name}")  # keeps the ending, by which torch compresses
        export(str(unfinished))
        os.replace(unfinished, path)
