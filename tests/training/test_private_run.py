"""A private run through the entry point that loses steps makes the same ones again: one release, not two."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.record import read_record
from pipeline.checkpoint.tensors import CheckpointTensors
from tests.support.ranks import run_on_ranks
from tests.support.small_runs import STEPS, history, overrides, train_on_ranks, write_data

PRIVATE: dict[str, Any] = {
    "finetune.dp.clip_norm": 0.5, "finetune.dp.noise_multiplier": 0.8, "optimizer.clip_grad": 0,
    "training.eval_every": 0, "model.num_layers": 2, "checkpoint.keep_last": 9,
}  # fmt: skip
TWO_RANKS: dict[str, Any] = {
    "parallel.tensor_parallel_size": 2, "parallel.sequence_parallel": "true", "training.micro_batch_size": 4,
}  # fmt: skip


def last(run: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(what is said of its privacy, tensors) of a run's newest checkpoint."""
    folder = folders.find(run)
    tensors = CheckpointTensors(folder)
    privacy = read_record(folder).privacy
    assert privacy is not None
    return privacy, {name: tensors.tensor(name) for name in tensors.names}


@pytest.mark.slow
def test_steps_that_were_lost_are_made_again_with_the_same_noise(tmp_path: Path) -> None:
    """All behind step 3 are; bitwise at one process, within 1e-5 at two tensor-parallel ranks with other micro-batches."""
    pytest.importorskip("opacus")
    data = write_data(tmp_path / "data")
    run_on_ranks(train_on_ranks, 1, overrides(data, tmp_path, "whole", **PRIVATE))
    for name in ("broken", "moved"):
        shutil.copytree(tmp_path / "whole", tmp_path / name, symlinks=True)
        for step, folder in folders.list_checkpoints(tmp_path / name / "checkpoints"):
            if step > 3:
                shutil.rmtree(folder)
        (tmp_path / name / "metrics.jsonl").unlink()
        assert read_record(folders.find(tmp_path / name)).step == 3
    run_on_ranks(train_on_ranks, 1, overrides(data, tmp_path, "broken", **PRIVATE))
    run_on_ranks(train_on_ranks, 2, overrides(data, tmp_path, "moved", **PRIVATE, **TWO_RANKS))

    expected, weights = last(tmp_path / "whole")
    assert expected["reads"] == 1 and len(history(tmp_path / "whole")) == STEPS
    for name, tolerance in [("broken", 0.0), ("moved", 1e-5)]:
        privacy, found = last(tmp_path / name)
        assert privacy == expected
        assert found.keys() == weights.keys()
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, weights[key], rtol=tolerance, atol=tolerance)
        losses, others = history(tmp_path / name), history(tmp_path / "whole")
        assert sorted(losses) == list(range(4, STEPS + 1))
        for step, (loss, _, samples) in losses.items():
            assert loss == pytest.approx(others[step][0], rel=tolerance, abs=0)
            assert samples == others[step][2]
