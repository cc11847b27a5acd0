"""The rules of the architecture, alone and cut by tensor parallelism; see `rules`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from pipeline.config.choices import Float8, NormPlacement, Position, Precision, RopeScaling
from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import resolve
from pipeline.config.number_rules import broken_numbers
from pipeline.config.parameter_names import linear_shapes
from pipeline.config.training import ParallelConfig, TrainingConfig
from pipeline.config.vision import vision_fits

# Of CUDA's kernel of float8 products.
FLOAT8_SIDES = 16
MOST = 2**31
"""No size of a model is larger: it would not fit the 32-bit counts of the kernels."""


def alone(model: ModelConfig) -> Iterator[str]:
    """Every rule that a model breaks in whatever run: for models that come from outside."""
    broken = [problem for _, problem in broken_numbers({"model": model}, most=MOST - 1)]
    yield from broken
    if broken:
        return  # the rules below divide by them
    yield from head_width_fits(model)
    yield from rotary_fits(model)
    yield from groups_fit(model)
    yield from architecture(model)
    yield from vision_fits(model)


def head_width_fits(model: ModelConfig) -> Iterator[str]:
    """Heads share the width of the model unless theirs is set."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    if model.head_dim is None and hidden % heads:
        yield (
            f"model.hidden_size ({hidden}) must be a multiple of model.num_attention_heads "
            f"({heads}), or set model.head_dim. Nearest width: "
            f"{max(1, round(hidden / heads)) * heads}."
        )


def rotary_fits(model: ModelConfig) -> Iterator[str]:
    """Rotary positions turn pairs."""
    width = resolve(model).head_dim
    if model.position is Position.rope and width % 2:
        yield (
            f"rotary positions need an even head_dim, not {width}. Set model.head_dim={width + 1}, "
            "or model.position=learned."
        )


def groups_fit(model: ModelConfig) -> Iterator[str]:
    """Each key/value head serves as many attention heads."""
    heads, groups = model.num_attention_heads, resolve(model).num_query_groups
    if heads % groups:
        yield (
            f"model.num_attention_heads ({heads}) must be a multiple of model.num_query_groups "
            f"({groups}). Set model.num_query_groups={math.gcd(heads, groups)}, or null."
        )


def architecture(model: ModelConfig) -> Iterator[str]:
    """Choices of the architecture that contradict each other."""
    if model.position is not Position.rope and model.rope_scaling is not RopeScaling.none:
        yield (
            f"model.rope_scaling={model.rope_scaling.name} has no effect with "
            f"model.position={model.position.name}. "
            "Set model.position=rope or model.rope_scaling=none."
        )
    if model.parallel_residual and model.norm_placement is NormPlacement.post:
        yield (
            "model.parallel_residual=true needs model.norm_placement=pre: "
            "a parallel block has one sum to normalise before."
        )
    moe = model.moe
    if moe.num_experts > 0 and not 1 <= moe.top_k <= moe.num_experts:
        yield (
            f"model.moe.top_k ({moe.top_k}) must be between 1 and model.moe.num_experts "
            f"({moe.num_experts}). Set model.moe.top_k={min(max(moe.top_k, 1), moe.num_experts)}."
        )
    if moe.num_experts > 0 and model.bias:
        yield (
            "mixture-of-experts layers have no biases: "
            "set model.bias=false (model.qkv_bias=true keeps the attention's)."
        )


def sequence_length(model: ModelConfig, name: str, seq_len: int | None) -> Iterator[str]:
    """Positions are known up to the longest sequence.

    Args:
        name: of the setting that seq_len comes from.
        seq_len: None: the longest.
    """
    longest = model.max_seq_len
    if seq_len is not None and seq_len > longest:
        yield (
            f"{name} ({seq_len}) must not exceed model.max_seq_len ({longest}). "
            f"Set {name}={longest} or model.max_seq_len={seq_len}."
        )


def vocabulary(model: ModelConfig, tokenizer_vocab_size: int | None) -> Iterator[str]:
    """Every id of the data has an embedding."""
    size = model.vocab_size
    if size is not None and tokenizer_vocab_size is not None and size < tokenizer_vocab_size:
        yield (
            f"model.vocab_size ({size}) is smaller than the datasets' tokenizer "
            f"({tokenizer_vocab_size} ids): ids from {size} up would have no embedding. Set "
            "model.vocab_size=null, or prepare the data with a tokenizer that fits."
        )


def tensor_parallel(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Every matrix is cut into equal parts; experts on ranks of their own are whole."""
    size, shape, moe = parallel.tensor_parallel_size, resolve(model), model.moe
    parts = {
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
    }
    if not moe.num_experts or parallel.expert_parallel_size == 1:
        parts["ffn_hidden_size"] = shape.ffn_hidden_size
    if moe.num_experts:
        parts["moe.shared_expert_ffn_hidden_size"] = moe.shared_expert_ffn_hidden_size
    fits = [t for t in range(1, size) if not any(value % t for value in parts.values())]
    for name, value in parts.items():
        if value % size:
            yield (
                f"model.{name} ({value}) must be divisible by parallel.tensor_parallel_size "
                f"({size}). Largest size that fits this model: {max(fits, default=1)}."
            )


def float8(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> Iterator[str]:
    """Products of float8 numbers stand in for those of bf16, of sides that fit the kernel."""
    if training.fp8 is Float8.none:
        return
    if training.precision is not Precision.bf16:
        yield (
            f"training.fp8={training.fp8.name} needs training.precision=bf16 (not "
            f"{training.precision.name}): its products come out in bf16. Set training.fp8=none."
        )
    if model.compile:
        yield (
            f"training.fp8={training.fp8.name} does not work with model.compile=true: "
            "torch.compile was not tried on its products. Set model.compile=false."
        )
    tensor = parallel.tensor_parallel_size
    vision = replace(model.vision, num_layers=min(1, model.vision.num_layers))
    one = replace(model, num_layers=1, vision=vision)
    for name, (rows, columns) in linear_shapes(one).items():
        is_column = name.endswith(("linear_qkv", "linear_fc1"))
        sides = (rows / tensor, columns) if is_column else (rows, columns / tensor)
        if ".local_experts." not in name and any(side % FLOAT8_SIDES for side in sides):
            yield (
                f"training.fp8={training.fp8.name} needs sides that are multiples of "
                f"{FLOAT8_SIDES}, and a rank's {name.rpartition('.')[2]} is {sides[0]:g} x "
                f"{sides[1]:g}. Choose other widths, or set training.fp8=none."
            )
