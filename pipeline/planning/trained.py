"""How much of a model is trained, and how much of a step that leaves.

    ModelConfig, FinetuneConfig --> num_trained_parameters, numbers_on_a_rank, first_trained_layer

Pure functions of the config; imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

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


def numbers_on_a_rank(
    names: Iterable[str],
    model: ModelConfig,
    finetune: FinetuneConfig,
    *,
    vocab_size: int,
    tensor: int,
    layers: int,
) -> float:
    """Numbers of these parameters on a tensor-parallel rank of the stage that holds most of them.

    Args:
        names: canonical names.
        vocab_size: rows of the embedding, padding included.
        tensor: tensor_parallel_size; of two low-rank matrices one is whole on every rank.
        layers: blocks of a stage.
    """
    shapes = parameter_shapes(model, finetune, vocab_size=vocab_size)
    in_layer, elsewhere = [0.0] * model.num_layers, 0.0
    for name in names:
        stem, _, kind = name.rpartition(".")
        is_column = stem.endswith(("linear_qkv", "linear_fc1"))
        is_whole = kind == ("lora_a" if is_column else "lora_b")
        size = math.prod(shapes[name]) / (1 if is_whole else tensor)
        if name.startswith("layers."):
            in_layer[int(name.split(".")[1])] += size
        else:
            elsewhere += size
    runs = range(model.num_layers - layers + 1)
    return elsewhere + max((sum(in_layer[i : i + layers]) for i in runs), default=0.0)
