"""The import command: a folder's architecture as a preset that can be trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from safetensors.numpy import save_file

from pipeline import cli
from pipeline.config.model import ModelConfig
from pipeline.errors import CheckpointError
from pipeline.hf_import import ImportConfig, main
from tests.support.llama_folder import LLAMA

ODD = "my model, [1]=a {b} ${c}"


def folder(root: Path, **changes: object) -> Path:
    """A folder whose name has what a command line or a yaml file may take for something else."""
    (root / ODD).mkdir()
    (root / ODD / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return root / ODD


@pytest.mark.parametrize("key", ["", "folder="])
def test_printed_settings_are_a_preset(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the folder is called: its path is literal, the preset's name is plain."""
    words = [f"{key}{folder(tmp_path)}"]
    assert main(cli.compose(ImportConfig, words, config="hf_import", positional=("folder",))) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), printed))
    assert isinstance(model, ModelConfig)
    assert (model.name, model.hidden_size, model.rope_theta) == ("my-model-1-a-b-c", 32, 5e5)


def test_what_is_not_computed_ends_in_words(tmp_path: Path) -> None:
    """With the file and the key."""
    with pytest.raises(CheckpointError, match="config.json asks for .*hidden_act='gelu'"):
        main(ImportConfig(folder=str(folder(tmp_path, hidden_act="gelu"))))


def test_weights_that_could_not_be_taken_over_are_refused_before_a_preset_is_made(
    tmp_path: Path,
) -> None:
    """Else the preset looks good, and the first training with it ends in the refusal."""
    root = folder(tmp_path)
    save_file({"other.weight": np.zeros(1, np.float32)}, root / "model.safetensors")
    with pytest.raises(CheckpointError, match="other.weight"):
        main(ImportConfig(folder=str(root)))
