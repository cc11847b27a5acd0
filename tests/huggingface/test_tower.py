"""A SigLIP folder as the start of an encoder: the real ones' sizes, every value at every layout, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.tensors import CheckpointTensors
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import VisionConfig
from pipeline.config.parameter_names import parameter_shapes
from pipeline.config.pretrain import PretrainConfig
from pipeline.errors import CheckpointError
from pipeline.huggingface.llava import TOWER_UNSAID, tower_of, tower_rules
from pipeline.huggingface.settings import read_model_config
from pipeline.huggingface.tower import Tower
from tests.engine.test_pictures import PLACEHOLDER
from tests.support.checkpoint_runs import Run
from tests.support.layouts import config
from tests.support.llama_folder import LLAMA
from tests.support.ranks import run_on_ranks
from tests.support.siglip_folder import TOWER, write_tower


def test_sizes_that_are_not_said_are_transformers(tmp_path: Path) -> None:
    """config.json of google/siglip-base-patch16-224 says model_type alone, and so400m not all."""
    from transformers import SiglipVisionConfig

    usual = SiglipVisionConfig()
    assert {key: getattr(usual, key) for key in TOWER_UNSAID} == TOWER_UNSAID
    assert (usual.hidden_act, usual.num_channels, usual.layer_norm_eps) == (
        "gelu_pytorch_tanh",
        3,
        1e-6,
    )
    assert tower_of({"model_type": "siglip_vision_model"}) == VisionConfig(
        num_layers=12, hidden_size=768, num_attention_heads=12, ffn_hidden_size=3072, image_size=224, patch_size=16
    )  # fmt: skip
    so400m = {
        "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
    }  # fmt: skip
    assert tower_of(so400m) == VisionConfig(
        num_layers=27, hidden_size=1152, num_attention_heads=16, ffn_hidden_size=4304, image_size=378, patch_size=14
    )  # fmt: skip


def seeing(**layout: Any) -> PretrainConfig:
    """A run whose encoder has the tower's sizes."""
    cfg = config("pictures", **layout)
    cfg.model.vision = tower_of(TOWER)
    return cfg


def test_another_encoder_is_told_what_to_set(tmp_path: Path) -> None:
    cfg = seeing()
    write_tower(tmp_path / "siglip", cfg.model)
    tower = Tower(tmp_path / "siglip")
    tower.check(cfg.model)
    cfg.model.vision.ffn_hidden_size, cfg.model.vision.num_layers = None, 3
    said = "Set model.vision.num_layers=2 model.vision.ffn_hidden_size=40"
    with pytest.raises(CheckpointError, match=said):
        tower.check(cfg.model)


def save_both(root: Path) -> None:
    """Checkpoints of a run without the tower and of one that begins with it. Collective."""
    from pipeline.training.initial_weights import begin

    for name, tower in (("drawn", None), ("begun", str(root / "siglip"))):
        cfg = seeing(tp=2)
        cfg.checkpoint.init_tower = tower
        run = Run(cfg, root / name, ends={"image_token_id": PLACEHOLDER})
        begin(run.engine, cfg.checkpoint, cfg.finetune, base=None)
        run.save(0)
        run.close()


@pytest.mark.slow
def test_the_encoder_begins_as_the_tower_and_all_else_as_without_it(tmp_path: Path) -> None:
    """On two ranks that share every matrix."""
    wanted = write_tower(tmp_path / "siglip", seeing().model)
    run_on_ranks(save_both, 2, tmp_path)
    drawn, begun = (CheckpointTensors(folders.find(tmp_path / n)) for n in ("drawn", "begun"))
    names = {name for name in begun.parameters if not name.startswith("vision.linear_")}
    assert {name for name in names if name.startswith("vision.")} == set(wanted)
    for name in begun.parameters:
        expected = wanted.get(name)
        if expected is None:
            expected = drawn.tensor(f"weights/{name}")
        assert torch.equal(begun.tensor(f"weights/{name}"), expected), name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("CLIPModel", "'clip_vision_model': CLIP has a class token, a norm in front of its blocks and quick_gelu"),
        ("CLIPVisionModel", "'clip_vision_model': CLIP has a class token"),
        ("Siglip2Model", "'siglip2_vision_model': SigLIP 2 resizes its positions"),
        ("Siglip2VisionModel", "'siglip2_vision_model': SigLIP 2 resizes its positions"),
        ("Dinov2Model", "'dinov2': DINOv2 has a class token"),
    ],
)  # fmt: skip
def test_towers_that_transformers_writes_and_that_compute_otherwise_are_refused(
    tmp_path: Path, name: str, reason: str
) -> None:
    """By the config.json of their own classes: nothing else of the folder is read."""
    import transformers

    getattr(transformers, name).config_class().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=reason):
        Tower(tmp_path)


def test_towers_that_are_no_siglip_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"model_type": "clip_vision_model"}}))  # fmt: skip
    with pytest.raises(CheckpointError, match="CLIP has a class token, a norm in front"):
        Tower(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TOWER))
    path = tmp_path / "model.safetensors"
    save_file({"vision_model.embeddings.patch_embedding.weight": torch.zeros(24, 3, 8, 8)}, path)
    reader = Tower(tmp_path)
    assert reader.vision.num_layers == 2 and len(load_file(path)) == 1
    llama = {**LLAMA, "vocab_size": 250}
    (tmp_path / "text").mkdir()
    (tmp_path / "text/config.json").write_text(json.dumps(llama))
    model = read_model_config(tmp_path / "text")
    model.vision = reader.vision
    shapes = parameter_shapes(model, FinetuneConfig(), vocab_size=250)
    with pytest.raises(CheckpointError, match="has no tensor .*patch_embedding.bias"):
        reader.tensors(model)
    whole = {
        theirs: torch.zeros_like(part, device="cpu")
        for rule in tower_rules(model, "vision_model.")
        for theirs, part in zip(rule.theirs, rule.split(torch.empty(shapes[rule.name], device="meta")), strict=True)
    }  # fmt: skip
    name = "vision_model.encoder.layers.0.self_attn.k_proj.weight"
    save_file({**whole, name: torch.zeros(24, 23)}, path)
    read = Tower(tmp_path).tensors(model)["vision.layers.0.self_attention.linear_qkv.weight"]
    with pytest.raises(
        CheckpointError, match=r"k_proj.weight is \(24, 23\), where .* says \(24, 24\)"
    ):
        read()
