"""Checkpoints and exported folders, made once for the tests of this package."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.huggingface.writer import DType
from tests.support.exported import EXPORTED, export_and_compare, save_models, tokenizer_file
from tests.support.layouts import MODELS
from tests.support.ranks import run_on_ranks


@pytest.fixture(scope="package")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of every model of EXPORTED, written by one process."""
    root = tmp_path_factory.mktemp("checkpoints")
    run_on_ranks(
        save_models, 1, {**EXPORTED, "capped": MODELS["capped"]}, root, tokenizer_file(root)
    )
    return root


@pytest.fixture(scope="package")
def exported(
    checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float]]:
    """The exported folders in fp32, and how far their logits are from ours."""
    output = tmp_path_factory.mktemp("exported")
    return output, run_on_ranks(
        export_and_compare, 1, list(EXPORTED), checkpoints, output, DType.fp32
    )[0]
