"""The command: sizes that mean nothing are refused before anything is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.activations import ActivationsConfig, _check
from pipeline.config.training import ParallelConfig
from pipeline.errors import ConfigError, MachineError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(shard_sequences=0), r"shard_sequences \(0\) and micro_batch_size \(8\) must be at least 1"),
        (dict(sequences=-1), r"sequences \(-1\) at least 0"),
        (dict(parallel=ParallelConfig(context_parallel_size=2)), r"context_parallel_size \(2\) must be 1"),
    ],
)  # fmt: skip
def test_sizes_without_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _check(ActivationsConfig(checkpoint="x", place="layers.0", output="y", **settings))


def test_a_folder_of_something_else_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    """It was found when the weights had been read."""
    (tmp_path / "notes.txt").touch()
    cfg = ActivationsConfig(checkpoint="x", place="layers.0", output=str(tmp_path))
    with pytest.raises(ConfigError, match="holds other files: choose another output=FOLDER"):
        _check(cfg)
    with pytest.raises(MachineError, match="plan.json cannot be written .* with output="):
        _check(replace(cfg, output=str(tmp_path / "notes.txt")))
