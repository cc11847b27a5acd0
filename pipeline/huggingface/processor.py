"""What transformers turns pictures into pixels and placeholders by, and pictures to compare with.

checkpoint.json, tokenizer --write_processor--> preprocessor_config.json, processor_config.json
FOLDER --AutoProcessor--> one placeholder for a picture becomes one for each of its patches
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import resolve
from pipeline.errors import CheckpointError
from pipeline.huggingface.json_files import read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.data.tokenizer import Tokenizer

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"


def write_processor(
    model: ModelConfig, output: Path, tokenizer: Tokenizer | None, image_token_id: int | None
) -> None:
    """Write the processor's files, and the placeholder's name into the tokenizer's settings.

    Args:
        tokenizer: whose files are in `output`; None: there is none, and no processor for texts.
        image_token_id: that stands for a patch.

    Raises:
        CheckpointError: the checkpoint does not say which token stands for a patch, or the
            tokenizer's settings are none.
    """
    vision = model.vision
    pixels: dict[str, Any] = {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": vision.image_size, "width": vision.image_size},
        "resample": 3,  # bicubic, as data_prep resizes
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    write_json(output / PREPROCESSOR, pixels)
    if tokenizer is None:
        return
    token = None if image_token_id is None else tokenizer.backend.id_to_token(image_token_id)
    if token is None:
        raise CheckpointError(
            f"the checkpoint does not say which token stands for a patch ({image_token_id}): it "
            "was trained on no pictures, or its tokenizer is another one."
        )
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": token,
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": 0,  # SigLIP has no class token
    }
    write_json(output / PROCESSOR, processor)
    path = output / "tokenizer_config.json"
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if path.is_file():  # a folder of others may lack it
        settings = read_json(path)
    named = {"image_token": token, "extra_special_tokens": {"image_token": token}}
    write_json(path, settings | named)


def fixed_pictures(
    model: ModelConfig, tokens: Tensor, image_token_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, images, patch_ids) on which logits are compared: a picture in each row of tokens.

    Args:
        tokens: (B, S), any; other placeholders are taken out of them.
    """
    import torch

    sizes, side = resolve(model).vision, model.vision.image_size
    assert sizes is not None
    tokens = torch.where(tokens == image_token_id, (image_token_id + 1) % tokens.max(), tokens)
    generator, patch_ids = torch.Generator().manual_seed(1), torch.full_like(tokens, -1)
    for row in range(len(tokens)):
        at = slice(row, row + sizes.num_patches)  # another place in each
        tokens[row, at], patch_ids[row, at] = image_token_id, torch.arange(sizes.num_patches)
    images = torch.randint(0, 256, (len(tokens), 1, 3, side, side), generator=generator)
    return tokens, images.to(torch.uint8), patch_ids
