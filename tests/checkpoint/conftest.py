"""Small checkpoints that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.checkpoint.checkpointer import Checkpointer
from pipeline.config.operation import CheckpointConfig
from tests.support.checkpoint_runs import ALONE, record_of, small_chunks
from tests.support.ranks import run_on_ranks


def write_small(folder: Path, steps: list[int]) -> None:
    """Checkpoints of one 40 x 30 matrix in two rectangles. Collective."""
    cfg = CheckpointConfig(keep_last=99)
    checkpointer = Checkpointer(cfg, folder=folder, layout=ALONE)
    for step in steps:
        checkpointer._write(small_chunks(step), record_of(step))
        assert checkpointer._outcome is None, checkpointer._outcome


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints of steps 1 and 2, written by two ranks."""
    folder = tmp_path_factory.mktemp("small")
    run_on_ranks(write_small, 2, folder, [1, 2])
    return folder
