"""From Hugging Face folders: the weights that the folder holds, all of them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.tensors import CheckpointTensors
from pipeline.config.model import ModelConfig
from pipeline.errors import CheckpointError
from pipeline.huggingface.reader import HuggingFaceWeights
from tests.support.checkpoint_runs import Run
from tests.support.exported import EXPORTED
from tests.support.layouts import VOCAB, config
from tests.support.ranks import run_on_ranks


@pytest.mark.parametrize("name", EXPORTED)
def test_imported_weights_are_bitwise_those_exported(
    name: str, checkpoints: Path, exported: tuple[Path, dict]
) -> None:
    """Folder -> our names and layouts -> the checkpoint the folder was made from."""
    folder = exported[0] / name
    model = replace(ModelConfig(**EXPORTED[name]), vocab_size=VOCAB)
    if name == "gpt2-without-biases":  # GPT-2 always has biases; zeros are as good
        with pytest.raises(CheckpointError, match="model.bias=true"):
            HuggingFaceWeights(folder, model)
        return
    weights, tensors = (
        HuggingFaceWeights(folder, model),
        CheckpointTensors(folders.find(checkpoints / name)),
    )
    for parameter in tensors.parameters:
        whole = tensors.tensor(f"weights/{parameter}")
        assert torch.equal(weights.tensor(parameter, tuple(whole.shape)), whole), parameter


def loss_after_import(cfg: Any, folder: Path, root: Path) -> float:
    run = Run(cfg, root)
    from pipeline.training.initial_weights import load_weights

    load_weights(run.engine, folder)
    loss = run.train(0, 1)[0][0]
    run.close()
    return loss


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_training_starts_from_a_hugging_face_folder_at_any_layout(
    name: str, exported: tuple[Path, dict], tmp_path: Path
) -> None:
    """The first loss on four ranks is transformers' loss, tied copies of a pipeline included."""
    from transformers import AutoModelForCausalLM

    from tests.support.layouts import batches

    folder = exported[0] / name
    cfg = config("gpt2" if name == "gpt2" else "modern", tp=2, pp=2)
    ours = run_on_ranks(loss_after_import, 4, cfg, folder, tmp_path)[0]
    step = batches()[0]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
            step["tokens"]
        ).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), step["labels"].flatten())
    assert ours == pytest.approx(float(theirs), rel=1e-5)


def test_folder_with_other_sizes_is_refused_with_the_settings_to_change(
    exported: tuple[Path, dict],
) -> None:
    """The message is what to type."""
    with pytest.raises(CheckpointError, match="model.num_layers=4 model.qk_norm=true"):
        HuggingFaceWeights(
            exported[0] / "qwen3",
            ModelConfig(**{**EXPORTED["llama"], "num_layers": 2, "tied_embeddings": False}),
        )
