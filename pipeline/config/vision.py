"""The picture encoder of a model: its blocks as settings of their own, and its rules.

ModelConfig --encoder_of--> ModelConfig of a ViT, whose blocks are built and counted as the
GPT's are
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.config.choices import Activation, Init, Normalization, NormPlacement, Position
from pipeline.config.model import ModelConfig, MoeConfig, VisionConfig
from pipeline.config.model_shape import resolve
from pipeline.config.training import ParallelConfig


@dataclass(frozen=True)
class RowPictures:
    """What a dataset says of the pictures in its rows."""

    image_size: int = 0
    patch_size: int = 0
    """Pixels of a side."""
    per_row: int = 0
    """Of the row that has most; 0: there are none."""


NORM_EPS = 1e-6
"""Of the encoder's norms, as SigLIP has it."""


VISION = {
    f"model.vision.{name}"
    for name in ("num_layers", "hidden_size", "num_attention_heads", "image_size", "patch_size")
}
"""What the sizes of an encoder follow from."""
CUT = {"vision", "model.vision.ffn_hidden_size"}
"""What the sizes of its parts follow from, beside those of the ranks and the model's heads."""


def encoder_of(model: ModelConfig) -> ModelConfig:
    """The blocks of the picture encoder as a model: SigLIP's settings, where it is no choice."""
    vision, sizes = model.vision, resolve(model).vision
    assert sizes is not None, "the model has no picture encoder"
    return replace(
        model,
        name="vision",
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        num_query_groups=None,
        head_dim=None,
        ffn_hidden_size=sizes.ffn_hidden_size,
        max_seq_len=sizes.num_patches,
        position=Position.none,
        normalization=Normalization.layernorm,
        norm_placement=NormPlacement.pre,
        norm_eps=NORM_EPS,
        activation=Activation.gelu_tanh,
        bias=True,
        qkv_bias=None,
        qk_norm=False,
        parallel_residual=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        moe=MoeConfig(),
        vision=VisionConfig(),
    )


def images_per_row(model: ModelConfig, seq_len: int, pictures: RowPictures | None) -> int:
    """Pictures that the encoder reads with each row, blank ones included.

    pictures: of the data; None: as many as a row of seq_len tokens can hold.
    """
    sizes = resolve(model).vision
    if sizes is None:
        return 0
    return max(1, seq_len // sizes.num_patches) if pictures is None else max(1, pictures.per_row)


def vision_fits(model: ModelConfig) -> Iterator[str]:
    """Pictures are cut into whole patches, and the encoder's heads share its width."""
    vision = model.vision
    if not vision.num_layers:
        return
    if vision.image_size % vision.patch_size:
        whole = max(1, vision.image_size // vision.patch_size) * vision.patch_size
        yield (
            f"model.vision.image_size ({vision.image_size}) must be a multiple of "
            f"model.vision.patch_size ({vision.patch_size}): a picture is cut into whole patches. "
            f"Nearest size: {whole}."
        )
    if vision.hidden_size % vision.num_attention_heads:
        yield (
            f"model.vision.hidden_size ({vision.hidden_size}) must be a multiple of "
            f"model.vision.num_attention_heads ({vision.num_attention_heads}). Set "
            "model.vision.num_attention_heads="
            f"{math.gcd(vision.hidden_size, vision.num_attention_heads)}."
        )
    if model.init is Init.mup:
        yield (
            "model.vision.num_layers needs another model.init than mup: which learning rates muP "
            "gives to a picture encoder is not known here. Set model.init=scaled."
        )


def pictures_fit(model: ModelConfig, pictures: RowPictures | None) -> Iterator[str]:
    """The encoder reads the pictures that the data have.

    Args:
        pictures: None: the data cannot be read, or are not known.
    """
    vision = model.vision
    if pictures is None:
        return
    if not pictures.per_row:
        if vision.num_layers:
            yield (
                f"model.vision.num_layers ({vision.num_layers}) reads pictures, and the data have "
                "none: set it 0, or prepare data with pictures (docs/pictures.md)."
            )
        return
    sizes = {"image_size": pictures.image_size, "patch_size": pictures.patch_size}
    if not vision.num_layers:
        typed = " ".join(f"model.vision.{name}={value}" for name, value in sizes.items())
        yield (
            "the data have pictures, and model.vision.num_layers is 0: the model would read "
            f"placeholders only. Set model.vision.num_layers=12 {typed}, or read other data."
        )
        return
    for name, value in sizes.items():
        if getattr(vision, name) != value:
            yield (
                f"model.vision.{name} ({getattr(vision, name)}) is not that of the data's pictures "
                f"({value}). Set model.vision.{name}={value}, or prepare the data again."
            )


def vision_cut(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Tensor parallelism cuts the encoder's blocks into equal parts, like the others."""
    vision, sizes, tensor = model.vision, resolve(model).vision, parallel.tensor_parallel_size
    if sizes is None:
        return
    parts = {
        "num_attention_heads": vision.num_attention_heads,
        "ffn_hidden_size": sizes.ffn_hidden_size,
    }
    for name, value in parts.items():
        if value % tensor:
            yield (
                f"model.vision.{name} ({value}) must be divisible by parallel.tensor_parallel_size "
                f"({tensor}). Largest size that fits the encoder: "
                f"{math.gcd(tensor, *parts.values())}."
            )
