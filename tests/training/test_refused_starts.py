"""Starts that end in a message: before torch is needed, before anything is written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.errors import PipelineError
from tests.support.ranks import run_on_ranks
from tests.support.small_runs import overrides, train_on_ranks, write_data
from tests.support.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def prepare(arguments: list[str], world_size: int = 1) -> None:
    """What pipeline.train does before it needs torch."""
    from pipeline.training import startup

    startup.check(cli.compose(PretrainConfig, arguments, config="pretrain"), world_size=world_size)


ERRORS: list[tuple[str, dict[str, Any], int, str]] = [
    ("misspelt key", {"training.total_step": 3}, 1, "total_steps"),
    ("heads", {"parallel.tensor_parallel_size": 3}, 3, "num_attention_heads"),
    ("layers", {"parallel.pipeline_parallel_size": 8}, 8, "num_layers"),
    ("global batch", {"training.global_batch_size": 7}, 1, "Set training.global_batch_size=8"),
    (
        "zero with pipeline",
        {"parallel.zero_stage": 2, "parallel.pipeline_parallel_size": 2},
        2,
        "zero_stage=2",
    ),
    ("vocabulary", {"model.vocab_size": 100}, 1, r"model.vocab_size \(100\)"),
    ("missing dataset", {"data.path": "no/such/folder"}, 1, "no/such/folder"),
]


@pytest.mark.parametrize("what, change, world_size, message", ERRORS, ids=[e[0] for e in ERRORS])
def test_bad_settings_end_before_torch_is_needed(
    what: str, change: dict[str, Any], world_size: int, message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match=message):
        prepare(overrides(data, tmp_path, **change), world_size)


def test_three_mistakes_are_named_at_once(data: Path, tmp_path: Path) -> None:
    wrong = {"data.path": "no/such/folder", "model.hidden_size": 63, "schedule.min_lr": 1.0}
    with pytest.raises(PipelineError) as caught:
        prepare(overrides(data, tmp_path, **wrong))
    for words in ("no/such/folder", "model.hidden_size (63)", "schedule.min_lr (1.0)"):
        assert words in str(caught.value)


def test_a_damaged_tokenizer_is_named(data: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(data, tmp_path / "broken")
    (broken / "train" / "tokenizer.json").write_text("{")
    with pytest.raises(PipelineError, match=r"tokenizer\.json"):
        prepare(overrides(broken, tmp_path))


def test_a_full_disk_is_reported_before_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(
        PipelineError, match=r" 0\.1 MiB free; two checkpoints of this model need .* runs_dir="
    ):
        prepare(overrides(data, tmp_path))


def test_a_run_folder_that_cannot_be_written_is_reported(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PipelineError, match=r"cannot be written .* runs_dir="):
        prepare(overrides(data, tmp_path / "file"))


def test_another_model_in_the_run_folder_is_refused(data: Path, tmp_path: Path) -> None:
    run_on_ranks(
        train_on_ranks,
        1,
        overrides(data, tmp_path, **{"training.total_steps": 2, "training.eval_every": 0}),
    )
    with pytest.raises(PipelineError, match=r"model\.hidden_size: 64 there, 32 here"):
        prepare(overrides(data, tmp_path, **{"model.hidden_size": 32}))


def test_an_error_on_the_command_line_has_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.train", "data.path=nowhere", f"runs_dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
