"""Models that read pictures as Llava folders: transformers' logits, its processor's pixels, and the way back."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.tensors import CheckpointTensors
from pipeline.config.model import ModelConfig
from pipeline.errors import CheckpointError
from pipeline.huggingface.llava import FIXED, text_of, tower_of
from pipeline.huggingface.loading import load_processor
from pipeline.huggingface.reader import HuggingFaceWeights
from pipeline.huggingface.settings import read_model_config
from pipeline.huggingface.writer import DType
from tests.engine.test_pictures import PATCHES, PLACEHOLDER, pictured
from tests.support.checkpoint_runs import Run
from tests.support.exported import export_and_compare, tokenizer_file
from tests.support.layouts import MODELS, PICTURES, VOCAB, config
from tests.support.ranks import run_on_ranks

SEEING: dict[str, dict[str, Any]] = {
    "gpt2": MODELS["pictures"],
    "qwen3": MODELS["modern-pictures"],
    "llama-tied": {**MODELS["modern-pictures"], "qk_norm": False, "tied_embeddings": True},
}


def save_seeing(root: Path, tokenizer: Path) -> None:
    """A checkpoint of each, trained for two steps with pictures, so that biases and norms are not 0 and 1."""
    for name, settings in SEEING.items():
        cfg = config()
        cfg.model = ModelConfig(**settings)
        cfg.optimizer.lr, cfg.schedule.warmup_steps = 0.03, 0
        run = Run(
            cfg, root / name, attachments={"tokenizer.json": tokenizer.read_bytes()},
            ends={"eod": 0, "image_token_id": PLACEHOLDER},
        )  # fmt: skip
        run.steps = pictured()
        run.train(0, 2)
        run.save(2)
        run.close()


def words(folder: Path) -> Path:
    """tokenizer_file, whose last token is the placeholder's and first ends documents."""
    path = tokenizer_file(folder)
    path.write_text(path.read_text().replace("<|endoftext|>", "<|image|>"))
    return path


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, float]]:
    """The checkpoints, their exported folders, and how far logits are from ours."""
    root = tmp_path_factory.mktemp("seeing")
    run_on_ranks(save_seeing, 1, root, words(root))
    output = root / "exported"
    found = run_on_ranks(export_and_compare, 1, list(SEEING), root, output, DType.fp32)[0]
    return root, output, found


def logits_with(folder: Path, *, other_pictures: bool) -> tuple[list[str], float]:
    """(missing and unexpected names, how far logits move with the picture that a row is shown)."""
    from transformers import AutoModelForImageTextToText

    warnings.simplefilter("ignore")
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    tokens = torch.arange(1, 25)[None].repeat(2, 1)
    tokens[:, 3 : 3 + PATCHES] = PLACEHOLDER
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    shown = pixels.flip(0) if other_pictures else pixels
    with torch.no_grad():
        first, second = (model(input_ids=tokens, pixel_values=p).logits for p in (pixels, shown))
    names = [*info["missing_keys"], *info["unexpected_keys"]]
    return names, float((first - second).abs().max())


def test_logits_are_transformers_and_pictures_move_them(
    seeing: tuple[Path, Path, dict[str, float]],
) -> None:
    _, exported, differences = seeing
    assert set(differences) == set(SEEING)
    for name, difference in differences.items():
        assert difference < 1e-4, name
        strange, moved = run_on_ranks(_logits, 1, exported / name)[0]
        assert strange == [] and moved > 1e-3, name


def _logits(folder: Path) -> tuple[list[str], float]:
    return logits_with(folder, other_pictures=True)


def test_the_processor_shows_what_training_saw(seeing: tuple[Path, Path, dict[str, float]]) -> None:
    """One placeholder becomes one for each patch, and pixels are the dataset's from -1 to 1, exactly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processor = load_processor(seeing[1] / "qwen3")
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        given = processor(images=Image.fromarray(pixels), text="<|image|> t5 t6", return_tensors="pt")  # fmt: skip
    assert given["input_ids"].tolist() == [[*[PLACEHOLDER] * PATCHES, 5, 6]]
    ours = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    assert float((given["pixel_values"][0] - ours).abs().max()) < 1e-6


@pytest.mark.parametrize("name", SEEING)
def test_a_folder_comes_back_bit_for_bit(
    name: str, seeing: tuple[Path, Path, dict[str, float]]
) -> None:
    root, exported, _ = seeing
    model = read_model_config(exported / name)
    tied = name == "llama-tied"  # GPT-2's head is written out: Llava ties by another name
    assert model.vision == replace(PICTURES, ffn_hidden_size=128)
    assert model.tied_embeddings == tied and model.vocab_size == VOCAB
    weights = HuggingFaceWeights(exported / name, model)
    tensors = CheckpointTensors(folders.find(root / name))
    for parameter in tensors.parameters:
        whole = tensors.tensor(f"weights/{parameter}")
        assert torch.equal(weights.tensor(parameter, tuple(whole.shape)), whole), parameter


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("vision_config", {"model_type": "clip_vision_model"}, "CLIP has a class token"),
    ("vision_config", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
    ("vision_config", {"num_channels": 1}, "num_channels=1"),
    ("vision_config", {"patch_size": None}, "patch_size=None, where whole"),
    ("", {"vision_feature_layer": -2}, "vision_feature_layer=-2"),
    ("", {"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy='default'"),
    ("", {"text_config": None}, "no text_config"),
    ("text_config", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
]


@pytest.mark.parametrize("part, change, message", REFUSED, ids=[r[2] for r in REFUSED])
def test_what_computes_otherwise_is_refused(
    part: str,
    change: dict[str, Any],
    message: str,
    seeing: tuple[Path, Path, dict[str, float]],
    tmp_path: Path,
) -> None:
    content = json.loads((seeing[1] / "qwen3/config.json").read_text())
    (content[part] if part else content).update(change)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        read_model_config(tmp_path)


def test_what_a_folder_does_not_say_is_what_transformers_takes() -> None:
    """google/siglip-base-patch16-224 names its tower's kind and nothing else; transformers 4 wrote so."""
    from transformers import SiglipVisionConfig

    kind = {"model_type": "siglip_vision_model"}
    assert tower_of(kind) == tower_of(SiglipVisionConfig().to_dict())
    assert tower_of({**kind, "image_size": 384}).image_size == 384


@pytest.mark.parametrize("key", FIXED)
def test_a_layer_that_a_llava_does_not_name_is_not_taken_for_ours(key: str) -> None:
    """Its features are those of another layer, or lack a patch: transformers' defaults are others."""
    from transformers import LlavaConfig, SiglipVisionConfig

    assert text_of({**FIXED, "text_config": {}}) == {}
    unsaid = {name: value for name, value in FIXED.items() if name != key}
    if getattr(LlavaConfig(vision_config=SiglipVisionConfig()), key) == FIXED[key]:
        assert text_of({**unsaid, "text_config": {}}) == {}
        return
    with pytest.raises(ValueError, match=f"{key}=.*which transformers takes where nothing is said"):
        text_of({**unsaid, "text_config": {}})


def test_a_tensor_of_another_tower_is_refused(
    seeing: tuple[Path, Path, dict[str, float]], tmp_path: Path
) -> None:
    shutil.copytree(seeing[1] / "qwen3", tmp_path / "more")
    path = tmp_path / "more/model.safetensors"
    more = {"model.vision_tower.head.probe": torch.zeros(1, 1, 32)}
    save_file(load_file(path) | more, path, {"format": "pt"})
    model = read_model_config(tmp_path / "more")
    with pytest.raises(CheckpointError, match="vision_tower.head.probe"):
        HuggingFaceWeights(tmp_path / "more", model)
