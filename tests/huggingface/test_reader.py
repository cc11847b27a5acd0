"""From Hugging Face folders: the weights that the folder holds, all of them."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

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


def edited(source: Path, folder: Path, change: Any) -> Path:
    """A copy of a folder, its tensors changed."""
    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


def test_head_of_its_own_under_a_tied_config_is_refused(
    exported: tuple[Path, dict], tmp_path: Path
) -> None:
    """transformers 5 keeps it, 4 drops it: it was dropped without a word."""

    def untie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    model = replace(ModelConfig(**EXPORTED["llama"]), vocab_size=VOCAB)
    with pytest.raises(CheckpointError, match="tie_word_embeddings=true, but lm_head.weight"):
        HuggingFaceWeights(edited(exported[0] / "llama", tmp_path / "own", untie), model)

    def copy(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    HuggingFaceWeights(edited(exported[0] / "llama", tmp_path / "copy", copy), model)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "score.weight"])
def test_tensors_that_would_not_be_used_are_named(
    name: str, exported: tuple[Path, dict], tmp_path: Path
) -> None:
    """They say that the folder holds another model than its config.json."""
    model = replace(ModelConfig(**EXPORTED["llama"]), vocab_size=VOCAB)
    folder = edited(
        exported[0] / "llama",
        tmp_path / "more",
        lambda tensors: tensors.update({name: torch.ones(64)}),
    )
    with pytest.raises(CheckpointError, match=f"{name}, which this program would not use"):
        HuggingFaceWeights(folder, model)


def test_masks_and_rotary_tables_are_no_weights(
    exported: tuple[Path, dict], tmp_path: Path
) -> None:
    """OpenAI's GPT-2 folders have a mask a layer, and no prefix."""

    def bare(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)

    model = replace(ModelConfig(**EXPORTED["gpt2"]), vocab_size=VOCAB)
    folder = edited(exported[0] / "gpt2", tmp_path / "bare", bare)
    name = "embedding.word.weight"
    expected = HuggingFaceWeights(exported[0] / "gpt2", model).tensor(name, (VOCAB, 64))
    assert torch.equal(HuggingFaceWeights(folder, model).tensor(name, (VOCAB, 64)), expected)


def test_quantised_weights_are_refused(exported: tuple[Path, dict], tmp_path: Path) -> None:
    """Integers are no weights without their scales."""

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    model = replace(ModelConfig(**EXPORTED["llama"]), vocab_size=VOCAB)
    folder = edited(exported[0] / "llama", tmp_path / "int8", quantise)
    with pytest.raises(CheckpointError, match="is of type I8: the weights are quantised"):
        HuggingFaceWeights(folder, model)


def test_second_copy_in_another_spelling_is_left_alone(
    exported: tuple[Path, dict], tmp_path: Path
) -> None:
    """Mistral's folders hold consolidated.safetensors beside what transformers reads."""
    model = replace(ModelConfig(**EXPORTED["llama"]), vocab_size=VOCAB)
    folder = edited(exported[0] / "llama", tmp_path / "two", lambda tensors: None)
    save_file({"tok_embeddings.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    HuggingFaceWeights(folder, model)


# How transformers' classes are made small; what they write is read back.
THEIRS: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": False}, "Mistral": {"sliding_window": None}, "Qwen2": {}, "Qwen3": {"head_dim": 8},
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
                 "moe_intermediate_size": 24},
}  # fmt: skip


def differences_of_logits(root: Path) -> dict[str, float]:
    """Largest |difference| for each class of THEIRS between it and our forward pass on its folder."""
    import transformers

    from pipeline.huggingface.settings import read_model_config
    from pipeline.model.local_model import LocalModel

    warnings.simplefilter("ignore")
    found = {}
    for name, options in THEIRS.items():
        torch.manual_seed(0)
        cfg = getattr(transformers, f"{name}Config")(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=64, **options,
        )  # fmt: skip
        theirs = getattr(transformers, f"{name}ForCausalLM")(cfg).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.normal_(std=0.3)
        theirs.save_pretrained(root / name)
        model = read_model_config(root / name)
        weights = HuggingFaceWeights(root / name, model)
        ours = LocalModel(model, weights.whole)
        tokens = torch.randint(0, 64, (2, 48))
        with torch.no_grad():
            found[name] = float((theirs(input_ids=tokens).logits - ours.logits(tokens)).abs().max())
    return found


def test_folders_that_transformers_writes_compute_the_same_here(tmp_path: Path) -> None:
    """Its own classes and its own files, as the installed release writes them."""
    found = run_on_ranks(differences_of_logits, 1, tmp_path)[0]
    assert found.keys() == THEIRS.keys() and max(found.values()) < 1e-4, found
