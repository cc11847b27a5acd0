"""What a holder of weights owes to those who read and write them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import nn

from pipeline.config.model import ModelConfig
from pipeline.distributed.layout import ParallelLayout
from pipeline.model.fragments import Fragment
from pipeline.model.names import canonical_name
from pipeline.model.partition import Partition, is_split

VOCABULARY = ("embedding.word.weight", "head.weight")


class Weights(Protocol):
    """This rank's part of a model's weights, whoever computes with them."""

    model: ModelConfig
    layout: ParallelLayout

    def all_parameters(self) -> dict[str, tuple[nn.Parameter, Partition]]:
        """Canonical name -> (parameter, its partition) of this stage, tied copies included."""

    def fragments(self) -> list[Fragment]:
        """Views of what this rank holds, tied copies included."""

    def publish_weights(self) -> None:
        """What was written into the views is what the model computes with. Collective."""


def named_parameters(module: nn.Module, model: ModelConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """(canonical name, parameter) of this rank's part of a model."""
    for name, parameter in module.named_parameters():
        yield canonical_name(name, num_layers=model.num_layers), parameter


def partition_of(
    name: str, parameter: nn.Parameter, layout: ParallelLayout, *, vocab_size: int
) -> Partition:
    """Which part of the whole parameter `name` this tensor-parallel rank's is."""
    return Partition.of(
        tuple(parameter.shape),
        dim=getattr(parameter, "partition_dim", None) if is_split(parameter) else None,
        stride=getattr(parameter, "partition_stride", 1),
        tensor_rank=layout.tensor.rank,
        tensor_size=layout.tensor.size,
        real_size=vocab_size if name in VOCABULARY else None,
    )
