"""The command: what it refuses, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import DataConfig
from pipeline.errors import ConfigError, MachineError
from pipeline.probe import ProbeConfig, _request, main
from pipeline.probing.findings import strongest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(answer=" B"), "patch_into and answer go with a prompt"),
        (dict(prompt="A B", data=DataConfig(path="OUT")), r"data\.\* and seq_len would have no effect"),
        (dict(prompt="A B", seq_len=8), r"data\.\* and seq_len would have no effect"),
        (dict(curve=True), "curve=true needs a run with its checkpoints, and x holds none"),
        (dict(train_lens=5, tuned_lens="a"), r"train_lens \(5\) is a number of steps, and goes without"),
        (dict(train_lens=5, prompt="A B"), "train_lens reads held-out sequences behind those"),
        (dict(train_lens=5, sequences=0), "train_lens reads held-out sequences behind those"),
        (dict(micro_batch_size=0), r"micro_batch_size \(0\) must be at least 1"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    """Before the checkpoint is looked for."""
    with pytest.raises(ConfigError, match=message):
        _request(ProbeConfig(checkpoint="x", **settings))


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    """A model folder may be read-only: the passes over the text would be lost."""
    (tmp_path / "taken").touch()
    with pytest.raises(MachineError, match="taken/probe.json cannot be written .* with output="):
        main(ProbeConfig(checkpoint="x", output=str(tmp_path / "taken")))


def test_the_strongest_heads_are_named_by_block_and_head() -> None:
    assert strongest([[0.1, 0.7], [0.3, 0.2]]) == ["0.1 0.700", "1.0 0.300", "1.1 0.200"]
