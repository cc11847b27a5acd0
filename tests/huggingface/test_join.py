"""A text folder and a SigLIP tower become one: transformers reads the tower as it was, training begins with both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.config.model import ModelConfig, VisionConfig
from pipeline.config.vision import encoder_of
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import CheckpointError, ConfigError
from pipeline.huggingface.join import join
from pipeline.huggingface.processor import write_processor
from pipeline.huggingface.reader import HuggingFaceWeights
from pipeline.huggingface.settings import read_model_config
from pipeline.huggingface.tower import Tower
from pipeline.huggingface.writer import DType
from tests.support.exported import tokenizer_file
from tests.support.llama_folder import LLAMA
from tests.support.ranks import run_on_ranks
from tests.support.siglip_folder import make_folders


def towers_alike(root: Path) -> tuple[float, float]:
    """Largest difference of the tower's last hidden states, SigLIP's own and ours; and how large they are.

    The tower is the same out of the whole SigLIP and saved alone, which is how transformers names SigLIP 2 of fixed
    shapes too.
    """
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
    tower.save_pretrained(root / "alone")
    found = [Tower(folder).tensors(model) for folder in (siglip, root / "alone")]
    for name, whole in found[0].items():
        assert torch.equal(whole(), found[1][name]()) and torch.equal(whole(), weights.whole(name))
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
    with pytest.raises(
        CheckpointError, match="tokenizer_config.json (cannot be read|holds no settings)"
    ):
        write_processor(model, tmp_path, tokenizer, 200)
