"""How much of a model is trained, and how much of a step that leaves.

    ModelConfig, FinetuneConfig --> num_trained_parameters, size_on_a_rank, first_trained_layer

Pure functions of the config; imports no torch.
"""

from __future__ import annotations

import math

from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig
from pipeline.config.parameter_names import is_lora, parameter_shapes, trained_names
from pipeline.config.stages import places_of


def num_trained_parameters(model: ModelConfig, finetune: FinetuneConfig, vocab_size: int) -> int:
    """Numbers that the optimizer updates, low-rank matrices included."""
    shapes = parameter_shapes(model, finetune, vocab_size=vocab_size)
    return sum(math.prod(shapes[name]) for name in trained_names(shapes, model, finetune))


def num_low_rank_parameters(model: ModelConfig, finetune: FinetuneConfig) -> int:
    """Numbers of the low-rank matrices, which the model itself has not."""
    shapes = parameter_shapes(model, finetune, vocab_size=1)
    return sum(math.prod(shape) for name, shape in shapes.items() if is_lora(name))


def first_trained_layer(model: ModelConfig, finetune: FinetuneConfig) -> int:
    """The first block that the backward pass reaches; num_layers: none, the head only."""
    names = trained_names(parameter_shapes(model, finetune, vocab_size=1), model, finetune)
    first = min((min(places_of(name, model)) for name in names), default=model.num_layers + 1)
    return min(max(first - 1, 0), model.num_layers)


def is_of_expert(name: str) -> bool:
    """Whether the parameter of this canonical name belongs to one of a layer's experts."""
    return ".local_experts." in name


def size_on_a_rank(name: str, shape: tuple[int, ...], *, tensor: int, expert: int = 1) -> float:
    """Numbers of a parameter that a tensor-parallel rank holds; of an expert's, in the mean.

    Matrices and the biases of column-parallel ones are split; norms, positions, a router and the
    biases of row-parallel ones are whole on every rank, and so is one of two low-rank matrices.

    Args:
        name: canonical.
        shape: whole.
        tensor: tensor_parallel_size.
        expert: expert_parallel_size.
    """
    if expert > 1 and is_of_expert(name):
        return math.prod(shape) / expert
    stem, _, kind = name.rpartition(".")
    is_column = stem.endswith(("linear_qkv", "linear_fc1"))
    is_linear = is_column or stem.endswith(("linear_proj", "linear_fc2"))
    is_table = name in ("embedding.word.weight", "head.weight")
    kinds = ("weight", "bias", "lora_b") if is_column else ("weight", "lora_a")
    is_split = is_table or (is_linear and kind in kinds)
    return math.prod(shape) / (tensor if is_split else 1)
