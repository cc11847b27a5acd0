"""What a device must hold, before it is asked to.

    sections, RunShape --> estimate --> GiB of weights, gradients, optimizer, activations

Of the rank that holds most. Pure arithmetic, good to about 15 %: allocator slack, communication
buffers (1 to 2 GiB) and the CUDA context are not in it. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from pipeline.config.choices import OptimizerName, Precision, Recompute
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import resolve
from pipeline.config.parameter_names import is_lora, parameter_names, trained_names
from pipeline.config.run_shape import RunShape
from pipeline.config.training import ParallelConfig, TrainingConfig
from pipeline.planning.flops import num_parameters
from pipeline.planning.trained import first_trained_layer, numbers_on_a_rank

GIB = 2**30
# Bytes of element-wise optimizer state per parameter, fp32.
STATE_BYTES = {OptimizerName.adamw: 8}


@dataclass(frozen=True)
class Memory:
    """GiB on the rank that holds most."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        """Such as `41.2 GiB: weights 12.1, gradients 12.1, optimizer 9.0, activations 8.0`."""
        parts = ", ".join(
            f"{name} {getattr(self, name):.1f}"
            for name in ("weights", "gradients", "optimizer", "activations")
        )
        return f"{self.total:.1f} GiB: {parts}"


def estimate(
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    finetune: FinetuneConfig,
    *,
    optimizer: OptimizerName,
    shape: RunShape,
) -> Memory:
    """What the first stage needs at its peak: it holds the embedding and most micro-batches."""
    stage, shards = shape.zero_stage, shape.sizes.data
    wide = 4 if training.precision is Precision.fp32 else 2
    layers = math.ceil(model.num_layers / shape.sizes.pipeline)
    whole = num_parameters(model, shape.padded_vocab_size)
    one_layer = (
        whole - num_parameters(replace(model, num_layers=0), shape.padded_vocab_size)
    ) / model.num_layers
    parameters = (whole - (model.num_layers - layers) * one_layer) / shape.sizes.tensor
    trained = _trained(model, finetune, shape, layers=layers, whole=parameters)
    parameters += _trained(model, finetune, shape, layers=layers, whole=0.0, is_wanted=is_lora)
    # Stage 0 updates the weights themselves; the others keep an fp32 copy of the part they own.
    state = STATE_BYTES[optimizer] + (4 if stage > 0 else 0)
    in_flight = min(shape.sizes.pipeline, shape.at(shape.total_steps).num_micro_batches)
    kept = _activations(
        model, parallel, training, finetune, shape, layers=layers, in_flight=in_flight
    )
    return Memory(
        weights=parameters * wide / (shards if stage == 3 else 1) / GIB,
        gradients=trained * 4 / (shards if stage >= 2 else 1) / GIB,
        optimizer=0.0
        if parallel.offload_optimizer
        else trained * state / (shards if stage > 0 else 1) / GIB,
        activations=kept / GIB,
    )


def _trained(
    model: ModelConfig,
    finetune: FinetuneConfig,
    shape: RunShape,
    *,
    layers: int,
    whole: float,
    is_wanted: Callable[[str], bool] = lambda _: True,
) -> float:
    """Numbers of a rank that are trained, of those wanted; `whole` where all of them are."""
    if "*" in finetune.train and not finetune.lora_rank:
        return whole
    names = parameter_names(model, finetune)
    return numbers_on_a_rank(
        filter(is_wanted, trained_names(names, model, finetune)),
        model,
        finetune,
        vocab_size=shape.padded_vocab_size,
        tensor=shape.sizes.tensor,
        layers=layers,
    )


def _activations(
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    finetune: FinetuneConfig,
    shape: RunShape,
    *,
    layers: int,
    in_flight: int,
) -> float:
    """Bytes kept for the backward pass, attention scores never (flash attention).

    Per layer and token: 10 h that tensor parallelism alone does not split (inputs, norms,
    residuals), and qkv, context and the MLP's inner width that it does. Source: Korthikanti et al.
    2022, arXiv:2205.05198, section 4 (34 s b h).
    """
    tensor = shape.sizes.tensor
    wide = 4 if training.precision is Precision.fp32 else 2
    tokens = shape.micro_batch_size * shape.seq_len
    hidden, sizes = model.hidden_size, resolve(model)
    heads, groups = model.num_attention_heads, sizes.num_query_groups
    experts = model.moe.top_k if model.moe.num_experts else 1
    inner = sizes.ffn_hidden_size * sizes.num_mlp_matrices * experts
    common = 5 * hidden / (tensor if parallel.sequence_parallel else 1)
    split = ((2 * heads + 2 * groups) * sizes.head_dim + inner) / tensor
    layer = tokens * wide * (common + split)
    # Nothing is kept for blocks that the backward pass does not reach.
    layers = min(layers, max(1, model.num_layers - first_trained_layer(model, finetune)))
    # Every n-th block keeps its input only, and lives again one at a time.
    if training.recompute is Recompute.full:
        kept = tokens * wide * hidden
        again = math.ceil(layers / training.recompute_every)
        return in_flight * (again * kept + (layers - again) * layer) + layer
    if training.recompute is Recompute.selective:
        layer -= tokens * wide * 2 * groups * sizes.head_dim / tensor
    return in_flight * layers * layer
