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


@pytest.mark.parametrize(
    ("files", "has"),
    [
        ({"chat_template.jinja": "{{ messages }}"}, True),
        ({"tokenizer_config.json": '{"chat_template": "{{ messages }}"}'}, True),
        ({"tokenizer_config.json": '{"chat_template": null}'}, False),
        # A processor's, which no tokenizer reads: the chat failed once the model was loaded.
        ({"tokenizer_config.json": "{}", "chat_template.json": "{}"}, False),
    ],
)
def test_a_template_is_one_that_the_tokenizer_reads(tmp_path, files, has):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert loading.holds_template(tmp_path) == has
