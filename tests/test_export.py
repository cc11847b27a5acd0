"""The export command: what is wrong is not called good, and what is good is scored by lm-eval."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import folder as folders
from pipeline.config.model import ModelConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.export import ExportConfig, main
from pipeline.huggingface import writer
from pipeline.huggingface.writer import DType
from pipeline.tracking.afterwards import TrackedRun
from pipeline.tracking.tracker import At
from tests.support.exported import export_and_compare, save_models, tokenizer_file
from tests.support.layouts import MODELS
from tests.support.ranks import run_on_ranks
from tests.support.trackers import Memory


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of GPT-2."""
    root = tmp_path_factory.mktemp("checkpoints")
    run_on_ranks(save_models, 1, {"gpt2": MODELS["gpt2"]}, root, tokenizer_file(root))
    return root


def wrong_export(root: Path, output: Path) -> str:
    warnings.simplefilter("ignore")
    right = writer.mapping_for

    def wrong(model: ModelConfig) -> Any:
        mapping = right(model)
        return replace(mapping, config={**mapping.config, "layer_norm_epsilon": 0.1})

    writer.mapping_for = wrong
    with pytest.raises(CheckpointError) as caught:
        main(ExportConfig(checkpoint=str(root / "gpt2"), output=str(output)))
    return str(caught.value)


def test_wrong_export_is_not_called_good(checkpoints: Path, tmp_path: Path) -> None:
    """The parity check must be able to fail, and then no folder may look usable."""
    message = run_on_ranks(wrong_export, 1, checkpoints, tmp_path / "wrong")[0]
    assert "the export is wrong" in message
    assert not (tmp_path / "wrong" / "config.json").exists()


@pytest.mark.parametrize(
    "wrong, message",
    [({"base": "elsewhere"}, "base=elsewhere has no effect"), ({"adapter": True}, "it is no adapter")],
)  # fmt: skip
def test_what_the_record_forbids_is_refused_before_the_checkpoint_is_read(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict, message: str
) -> None:
    """Every byte of a checkpoint was read first, which takes minutes where it is large."""
    monkeypatch.setattr(folders, "damage", lambda folder: pytest.fail("it was read"))
    cfg = ExportConfig(checkpoint=str(checkpoints / "gpt2"), output=str(tmp_path / "out"), **wrong)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        main(cfg)


def test_an_exported_folder_is_kept_by_the_trackers_of_its_run(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is there, and only when that is asked for."""
    memory = Memory(tmp_path)
    run = TrackedRun([memory], At(3, 96, 0.0))
    monkeypatch.setattr("pipeline.export.run_of", lambda _: run)
    for track in (False, True):
        output = tmp_path / str(track)
        cfg = ExportConfig(str(checkpoints / "gpt2"), str(output), check=False, track=track)
        assert main(cfg) == 0 and (output / "config.json").exists()
    facts = {"dtype": "bf16", "adapter": False, "checked": False}
    assert memory.models == [(3, tmp_path / "True", facts)]


LM_EVAL_TASK = """
task: counting
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: ["t5", "t250"]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
def test_lm_eval_scores_an_exported_folder(checkpoints: Path, tmp_path: Path) -> None:
    """Any lm-eval task is one command away; here a local one of four questions, offline."""
    run_on_ranks(export_and_compare, 1, ["gpt2"], checkpoints, tmp_path, DType.fp32)
    questions = "".join(json.dumps({"prompt": f"t{i} t{i + 1}"}) + "\n" for i in range(4))
    (tmp_path / "questions.jsonl").write_text(questions)
    (tmp_path / "counting.yaml").write_text(LM_EVAL_TASK.format(file=tmp_path / "questions.jsonl"))
    options = {
        "model": "hf", "model_args": f"pretrained={tmp_path / 'gpt2'}", "device": "cpu", "tasks": "counting",
        "include_path": str(tmp_path), "output_path": str(tmp_path / "scores.json"),
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        *(word for key, value in options.items() for word in (f"--{key}", value)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [scores] = [json.loads(path.read_text()) for path in tmp_path.glob("scores*.json")]
    assert 0.0 <= scores["results"]["counting"]["acc,none"] <= 1.0
    assert scores["n-samples"]["counting"]["effective"] == 4
