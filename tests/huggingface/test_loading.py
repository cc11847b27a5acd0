"""What goes wrong while transformers loads a folder is told as what it is."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.huggingface import loading


@pytest.mark.parametrize("kind", ["tokenizer", "processor"])
def test_a_folder_without_one_is_told_so(tmp_path, monkeypatch, kind):
    pytest.importorskip("transformers")
    monkeypatch.setattr(loading, "check_folder", lambda folder: {})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"has no {kind} that transformers can load"):
        getattr(loading, f"load_{kind}")(tmp_path)


@pytest.mark.parametrize(
    "raised, seen",
    [
        (torch.OutOfMemoryError("2 GiB"), torch.OutOfMemoryError),
        (MemoryError(), MemoryError),
        (KeyError("x"), CheckpointError),
    ],
)
def test_a_full_memory_is_not_the_folders_fault(tmp_path, monkeypatch, raised, seen):
    """`transformers cannot load FOLDER` sent people to look at a folder that is whole."""
    transformers = pytest.importorskip("transformers")

    def load(*_, **__):
        raise raised

    monkeypatch.setattr(loading, "check_folder", lambda folder: {})
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(seen):
        loading.load_transformers(tmp_path, torch.float32, torch.device("cpu"))
