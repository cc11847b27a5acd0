"""What an evaluation is: a model that is only asked, on held-out data, at a layout."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.choices import Precision
from pipeline.config.data import DataConfig
from pipeline.config.model import ModelConfig
from pipeline.config.training import ParallelConfig


@dataclass(frozen=True)
class Evaluation:
    """A model that is only asked; the model is a checkpoint's, the rest is set or the run's."""

    model: ModelConfig
    data: DataConfig
    """`validation` is what is scored; `train` is the same, or empty."""
    parallel: ParallelConfig
    """Sizes and sequence_parallel count; what concerns training alone does not."""
    precision: Precision
    seq_len: int
    """Tokens per sequence."""
    micro_batch_size: int
    """Sequences per data-parallel rank per forward pass."""
    sequences: int
    """Sequences per dataset; 0: all of it."""
