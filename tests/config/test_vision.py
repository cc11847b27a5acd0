"""Sizes and rules of the picture encoder: what cannot be cut is refused before anything starts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.config.choices import Activation, Init, Normalization, Position
from pipeline.config.model import ModelConfig, VisionConfig
from pipeline.config.model_shape import VisionShape, resolve
from pipeline.config.run_shape import derive
from pipeline.config.vision import RowPictures, encoder_of
from pipeline.errors import ConfigError
from tests.support.layouts import VOCAB, config

VISION = VisionConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, image_size=16, patch_size=8
)


def test_nulls_and_patches_are_worked_out() -> None:
    model = ModelConfig(name="m", num_layers=2, hidden_size=64, num_attention_heads=4)
    assert resolve(model).vision is None
    assert resolve(replace(model, vision=VISION)).vision == VisionShape(8, 128, 4, 192)
    wide = replace(VISION, ffn_hidden_size=40, image_size=224, patch_size=16)
    assert resolve(replace(model, vision=wide)).vision == VisionShape(8, 40, 196, 768)


def test_the_encoder_is_siglips_whatever_the_text_model_is() -> None:
    """Its blocks are exported as SigLIP's: what that class has no choice of is none here."""
    encoder = encoder_of(replace(config("modern").model, vision=VISION))
    assert (encoder.num_layers, encoder.hidden_size, encoder.num_attention_heads) == (2, 32, 4)
    assert encoder.position is Position.none and encoder.normalization is Normalization.layernorm
    assert encoder.activation is Activation.gelu_tanh and encoder.bias and not encoder.qk_norm
    assert resolve(encoder).num_query_groups == 4 and resolve(encoder).qkv_bias
    assert resolve(encoder).vision is None and encoder.norm_eps == 1e-6


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": 20}, r"image_size \(20\) must be a multiple of .*Nearest size: 16"),
        ({"num_attention_heads": 3}, r"Set model.vision.num_attention_heads=1"),
        ({"patch_size": 0}, r"model.vision.patch_size \(0\) must be at least 1"),
        ({"num_attention_heads": 0}, r"model.vision.num_attention_heads \(0\) must be at least"),
        ({"num_layers": -1}, r"model.vision.num_layers \(-1\) must be at least 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    cfg = config("gpt2")
    cfg = replace(cfg, model=replace(cfg.model, vision=replace(VISION, **change)))
    with pytest.raises(ConfigError, match=message):
        derive(cfg, world_size=1, tokenizer_vocab_size=VOCAB)


def test_an_encoder_is_cut_like_the_blocks() -> None:
    cfg = config("gpt2", tp=2)
    vision = replace(VISION, num_attention_heads=1, ffn_hidden_size=33)
    cfg = replace(cfg, model=replace(cfg.model, vision=vision))
    with pytest.raises(ConfigError) as found:
        derive(cfg, world_size=2, tokenizer_vocab_size=VOCAB)
    assert "model.vision.num_attention_heads (1) must be divisible by" in str(found.value)
    assert "model.vision.ffn_hidden_size (33) must be divisible by" in str(found.value)


def test_mup_knows_no_encoder() -> None:
    cfg = config("gpt2")
    model = replace(cfg.model, vision=VISION, init=Init.mup)
    with pytest.raises(ConfigError, match="another model.init than mup"):
        derive(replace(cfg, model=model), world_size=1, tokenizer_vocab_size=VOCAB)


@pytest.mark.parametrize(
    "vision, pictures, message",
    [
        (VISION, RowPictures(), "reads pictures, and the data have none"),
        (VisionConfig(), RowPictures(16, 8, 2), r"Set model.vision.num_layers=12 .*image_size=16"),
        (
            VISION,
            RowPictures(16, 4, 2),
            r"patch_size \(8\) is not that of the data's pictures \(4\)",
        ),
    ],
)
def test_an_encoder_reads_the_pictures_of_the_data(
    vision: VisionConfig, pictures: RowPictures, message: str
) -> None:
    """Before the first step, and before any process group."""
    cfg = config("gpt2")
    cfg = replace(cfg, model=replace(cfg.model, vision=vision))
    with pytest.raises(ConfigError, match=message):
        derive(cfg, world_size=1, tokenizer_vocab_size=VOCAB, pictures=pictures)


def test_a_row_is_full_of_pictures_where_no_data_say_better() -> None:
    cfg = config("gpt2")
    cfg = replace(cfg, model=replace(cfg.model, vision=VISION))
    sizes = {"world_size": 1, "tokenizer_vocab_size": VOCAB}
    assert derive(cfg, **sizes).images_per_row == 32 // 4
    assert derive(cfg, pictures=RowPictures(16, 8, 3), **sizes).images_per_row == 3
    assert derive(config("gpt2"), **sizes).images_per_row == 0
