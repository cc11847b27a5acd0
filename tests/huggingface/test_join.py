"""A text folder and a SigLIP tower become one: transformers reads the tower as it was, training begins with both."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig, VisionConfig
from pipeline.config.parameter_names import parameter_shapes
from pipeline.config.vision import encoder_of
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import CheckpointError, ConfigError
from pipeline.huggingface.join import Tower, join
from pipeline.huggingface.llava import tower_rules
from pipeline.huggingface.processor import write_processor
from pipeline.huggingface.reader import HuggingFaceWeights
from pipeline.huggingface.settings import read_model_config
from pipeline.huggingface.writer import DType
from tests.support.exported import tokenizer_file
from tests.support.llama_folder import LLAMA
from tests.support.ranks import run_on_ranks

TOWER: dict[str, Any] = {
    "model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 18, "patch_size": 8, "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6, "num_channels": 3,
}  # fmt: skip


def make_folders(root: Path) -> tuple[Path, Path]:
    """A Llama and a whole SigLIP, text tower, pooling head and all, as transformers saves them."""
    from transformers import LlamaConfig, LlamaForCausalLM, SiglipConfig, SiglipModel

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}  # fmt: skip
    siglip = SiglipModel(SiglipConfig(vision_config=TOWER, text_config=text))
    for parameter in siglip.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    siglip.save_pretrained(root / "siglip")
    llama = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "vocab_size": 250}))
    llama.save_pretrained(root / "llama")
    tokenizer_file(root / "llama")
    return root / "llama", root / "siglip"


def towers_alike(root: Path) -> tuple[float, float]:
    """Largest difference of the tower's last hidden states, SigLIP's own and ours; and how large they are."""
    from transformers import AutoModel, SiglipVisionModel

    from pipeline.model.local_model import LocalModel

    llama, siglip = make_folders(root)
    model = join(llama, siglip, root / "both", image_token="t200", dtype=DType.fp32)
    weights = HuggingFaceWeights(root / "both", model)
    ours = LocalModel(model, weights.whole)
    vision = ours.gpt.embedding.vision
    assert vision is not None
    kept = []
    vision.layers[-1].register_forward_hook(lambda *given: kept.append(given[-1]))
    images = torch.randint(0, 256, (2, 1, 3, 16, 16), dtype=torch.uint8)
    vision(images)
    tower = SiglipVisionModel.from_pretrained(siglip, dtype=torch.float32).eval()
    with torch.no_grad():
        # Of 18 pixels the convolution reads the first 16, as two patches of 8.
        padded = torch.nn.functional.pad(images.flatten(0, 1).float() / 127.5 - 1, (0, 2, 0, 2))
        theirs = tower(pixel_values=padded, output_hidden_states=True).hidden_states[-1]
    assert AutoModel.from_pretrained(root / "both", dtype=torch.float32) is not None
    return float((kept[0] - theirs).abs().max()), float(theirs.abs().max())


def test_the_tower_computes_what_siglip_does(tmp_path: Path) -> None:
    """Positions, blocks and activation are SigLIP's; its last norm and head are not on the way."""
    difference, largest = run_on_ranks(towers_alike, 1, tmp_path)[0]
    assert difference < 1e-5 < largest
    model = read_model_config(tmp_path / "both")
    assert (model.vision.num_layers, model.vision.image_size, model.vision.patch_size) == (2, 16, 8)
    assert encoder_of(model).ffn_hidden_size == 40
    written = json.loads((tmp_path / "both/config.json").read_text())
    assert written["image_token_index"] == 200 and written["vision_config"]["image_size"] == 16
    processor = json.loads((tmp_path / "both/processor_config.json").read_text())
    assert processor["image_token"] == "t200"
    with pytest.raises(ConfigError, match="has no token '<.image.>'"):
        join(
            tmp_path / "llama", tmp_path / "siglip", tmp_path / "b", image_token="<|image|>", dtype=DType.fp32
        )  # fmt: skip


def test_a_placeholder_that_the_text_model_has_no_row_for_is_refused(tmp_path: Path) -> None:
    """The folder would be written, and end in an index error where a picture is shown."""
    tokenizer_file(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "vocab_size": 200}))
    with pytest.raises(ConfigError, match="'t200' is the id 200, .* has the ids 0 to 199"):
        join(tmp_path, tmp_path, tmp_path / "out", image_token="t200", dtype=DType.fp32)


@pytest.mark.parametrize("content", ["[]", "{"])
def test_settings_of_a_tokenizer_that_are_none_are_refused(tmp_path: Path, content: str) -> None:
    """They are taken over from a stranger's folder, and the placeholder's name is put into them."""
    tokenizer = Tokenizer.from_file(tokenizer_file(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(content)
    model = ModelConfig(vision=VisionConfig(num_layers=1))
    with pytest.raises(CheckpointError, match="tokenizer_config.json (cannot be read|holds no)"):
        write_processor(model, tmp_path, tokenizer, 200)


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
        reader.tensors(model, shapes)
    whole = {
        theirs: torch.zeros_like(part, device="cpu")
        for rule in tower_rules(model, "vision_model.")
        for theirs, part in zip(rule.theirs, rule.split(torch.empty(shapes[rule.name], device="meta")), strict=True)
    }  # fmt: skip
    name = "vision_model.encoder.layers.0.self_attn.k_proj.weight"
    save_file({**whole, name: torch.zeros(24, 23)}, path)
    read = Tower(tmp_path).tensors(model, shapes)[
        "vision.layers.0.self_attention.linear_qkv.weight"
    ]
    with pytest.raises(
        CheckpointError, match=r"k_proj.weight is \(24, 23\), where .* says \(24, 24\)"
    ):
        read()
