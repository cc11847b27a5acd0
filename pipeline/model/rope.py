"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), rotate-half as in Llama."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.config.choices import RopeScaling
from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import resolve


class RopeTable:
    """cos and sin of every position, computed once a dtype, device and length."""

    def __init__(self, inverse_frequencies: Tensor) -> None:
        self.inverse_frequencies = inverse_frequencies
        self._cached: tuple | None = None

    def tables(self, seq_len: int, like: Tensor, *, sequence_first: bool) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (S, 1, 1, 1, D) or (1, S, 1, 1, D), with `like`'s dtype and device."""
        key = (seq_len, like.dtype, like.device, sequence_first)
        if self._cached is None or self._cached[0] != key:
            # In fp32 whatever the model's dtype: bf16 has no integer between 256 and 258.
            angles = torch.outer(
                torch.arange(seq_len, dtype=torch.float32), self.inverse_frequencies
            )
            angles = torch.cat([angles, angles], dim=-1)
            shape = (seq_len, 1, 1, 1, -1) if sequence_first else (1, seq_len, 1, 1, -1)
            self._cached = (
                key,
                *(t.view(shape).to(like.device, like.dtype) for t in (angles.cos(), angles.sin())),
            )
        return self._cached[1], self._cached[2]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (..., D) rotated by the angles of its position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def rope_table(model: ModelConfig) -> RopeTable:
    """The table of a model, with its frequency scaling.

    Source of `llama3`: the Llama 3.1 release; wavelengths beyond the original context are stretched
    by the factor, short ones kept, with a linear blend between original / 1 and original / 4.
    """
    # device="cpu" also under torch.device("cuda"): every device rounds the powers alike.
    width = resolve(model).head_dim
    frequencies = 1.0 / model.rope_theta ** (
        torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    )
    if model.rope_scaling is RopeScaling.linear:
        frequencies = frequencies / model.rope_scaling_factor
    elif model.rope_scaling is RopeScaling.llama3:
        # At 8192 original tokens: waves shorter than 2048 turned at least 4 times in training and
        # are kept (blend 1); those longer than 8192 never turned once and are stretched (blend 0).
        low_factor, high_factor = 1.0, 4.0
        wavelengths = 2 * math.pi / frequencies
        blend = (model.rope_original_max_seq_len / wavelengths - low_factor) / (
            high_factor - low_factor
        )
        blend = blend.clamp(0.0, 1.0)
        frequencies = (1 - blend) * frequencies / model.rope_scaling_factor + blend * frequencies
    return RopeTable(frequencies)
