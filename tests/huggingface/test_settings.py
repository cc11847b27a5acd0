"""config.json as our settings: every key that means something is used or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.huggingface.mapping import mapping_for
from pipeline.huggingface.settings import read_model_config
from tests.support.exported import EXPORTED


@pytest.mark.parametrize("name", EXPORTED)
def test_settings_read_from_a_folder_map_back_to_it(name: str, exported: tuple[Path, dict]) -> None:
    """pipeline.hf_import prints settings that train the same architecture."""
    model = read_model_config(exported[0] / name)
    written = json.loads((exported[0] / name / "config.json").read_text())
    again = mapping_for(model)
    free = {"architectures", "bos_token_id", "eos_token_id", "torch_dtype", "initializer_range"}
    assert {k: v for k, v in again.config.items() if k not in free} == {
        k: v for k, v in written.items() if k not in free
    }
