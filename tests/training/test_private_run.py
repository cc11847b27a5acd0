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
from pipeline.training.privacy import composed, epsilon
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


SHORT: dict[str, Any] = {
    **PRIVATE, "training.total_steps": 2, "checkpoint.save_every": 2, "schedule.warmup_steps": 1, "model.num_layers": 1,
}  # fmt: skip


def test_epsilon_is_in_the_checkpoint(tmp_path: Path) -> None:
    """Of one read at noise 0.8; the unit, and no secret beside it."""
    pytest.importorskip("opacus")
    data = write_data(tmp_path / "data")
    run_on_ranks(train_on_ranks, 1, overrides(data, tmp_path, "first", **SHORT))
    record = read_record(folders.find(tmp_path / "first"))
    assert record.privacy is not None and record.spent_before is None
    assert record.privacy["epsilon"] == epsilon(0.8, 1, 1e-5) and record.privacy["reads"] == 1
    assert record.privacy["unit"] == "one sequence of 64 tokens, left out or not"
    key = (tmp_path / "first/dp_noise.key").read_text()
    assert key not in (folders.find(tmp_path / "first") / "checkpoint.json").read_text()


@pytest.mark.slow
def test_epsilon_goes_on_with_the_weights(tmp_path: Path) -> None:
    """A private run, one without privacy on its weights, and a private one on those: each is counted once."""
    pytest.importorskip("opacus")
    data = write_data(tmp_path / "data")
    plain = {key: value for key, value in SHORT.items() if "finetune" not in key}
    runs = {
        "first": SHORT,
        "between": plain | {"checkpoint.init_from": tmp_path / "first"},
        "last": SHORT
        | {"finetune.dp.noise_multiplier": 2.0, "checkpoint.init_from": tmp_path / "between"},
    }
    for name, asked in runs.items():
        run_on_ranks(train_on_ranks, 1, overrides(data, tmp_path, name, **asked))
    first, between, third = (read_record(folders.find(tmp_path / name)) for name in runs)
    assert first.privacy is not None and third.privacy is not None
    owed = {key: first.privacy[key] for key in ("epsilon", "delta", "noise_multiplier", "reads")}
    assert between.privacy is None and between.spent_before == third.spent_before == [owed]
    assert third.privacy["epsilon"] == epsilon(2.0, 1, 1e-5)
    assert third.privacy["with_earlier"]["epsilon"] == composed([(0.8, 1), (2.0, 1)], 1e-5)
    longer = runs["last"] | {"training.total_steps": 3, "checkpoint.init_from": "null"}
    run_on_ranks(train_on_ranks, 1, overrides(data, tmp_path, "last", **longer))
    resumed = read_record(folders.find(tmp_path / "last"))
    assert resumed.step == 3 and resumed.spent_before == [owed]
