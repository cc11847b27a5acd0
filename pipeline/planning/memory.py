"""What a device must hold, before it is asked to; and which settings make it less.

    PretrainConfig, RunShape --> estimate --> GiB of weights, gradients, optimizer, activations

Of the rank that holds most.

Printed by the preflight, and when a device runs out of memory. Pure arithmetic, good to about 15 %:
allocator slack, communication buffers (1 to 2 GiB) and the CUDA context are not in it. Imports no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.choices import OptimizerName, Precision, Recompute
from pipeline.config.model_shape import resolve
from pipeline.config.parameter_names import is_lora, parameter_names, trained_names
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape, derive
from pipeline.errors import ConfigError
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


def estimate(cfg: PretrainConfig, shape: RunShape) -> Memory:
    """What the first stage needs at its peak: it holds the embedding and most micro-batches."""
    parallel, wide = cfg.parallel, 4 if cfg.training.precision is Precision.fp32 else 2
    model, stage, shards = cfg.model, shape.zero_stage, shape.sizes.data
    layers = math.ceil(model.num_layers / shape.sizes.pipeline)
    whole = num_parameters(model, shape.padded_vocab_size)
    one_layer = (
        whole - num_parameters(replace(model, num_layers=0), shape.padded_vocab_size)
    ) / model.num_layers
    parameters = (whole - (model.num_layers - layers) * one_layer) / shape.sizes.tensor
    trained = _trained(cfg, shape, layers=layers, whole=parameters)
    parameters += _trained(cfg, shape, layers=layers, whole=0.0, is_wanted=is_lora)
    # Stage 0 updates the weights themselves; the others keep an fp32 copy of the part they own.
    optimizer = STATE_BYTES[cfg.optimizer.name] + (4 if stage > 0 else 0)
    in_flight = min(shape.sizes.pipeline, shape.at(shape.total_steps).num_micro_batches)
    return Memory(
        weights=parameters * wide / (shards if stage == 3 else 1) / GIB,
        gradients=trained * 4 / (shards if stage >= 2 else 1) / GIB,
        optimizer=0.0
        if parallel.offload_optimizer
        else trained * optimizer / (shards if stage > 0 else 1) / GIB,
        activations=_activations(cfg, shape, layers=layers, in_flight=in_flight) / GIB,
    )


def _trained(
    cfg: PretrainConfig,
    shape: RunShape,
    *,
    layers: int,
    whole: float,
    is_wanted: Callable[[str], bool] = lambda _: True,
) -> float:
    """Numbers of a rank that are trained, of those wanted; `whole` where all of them are."""
    model, finetune = cfg.model, cfg.finetune
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


def _activations(cfg: PretrainConfig, shape: RunShape, *, layers: int, in_flight: int) -> float:
    """Bytes kept for the backward pass, attention scores never (flash attention).

    Per layer and token: 10 h that tensor parallelism alone does not split (inputs, norms,
    residuals), and qkv, context and the MLP's inner width that it does. Source: Korthikanti et al.
    2022, arXiv:2205.05198, section 4 (34 s b h).
    """
    model, tensor = cfg.model, shape.sizes.tensor
    wide = 4 if cfg.training.precision is Precision.fp32 else 2
    tokens, hidden, sizes = (
        shape.micro_batch_size * shape.seq_len,
        model.hidden_size,
        resolve(model),
    )
    heads, groups = model.num_attention_heads, sizes.num_query_groups
    experts = model.moe.top_k if model.moe.num_experts else 1
    inner = sizes.ffn_hidden_size * sizes.num_mlp_matrices * experts
    common = 5 * hidden / (tensor if cfg.parallel.sequence_parallel else 1)
    split = ((2 * heads + 2 * groups) * sizes.head_dim + inner) / tensor
    layer = tokens * wide * (common + split)
    # Nothing is kept for blocks that the backward pass does not reach.
    layers = min(layers, max(1, model.num_layers - first_trained_layer(model, cfg.finetune)))
    # Every n-th block keeps its input only, and lives again one at a time.
    if cfg.training.recompute is Recompute.full:
        kept = tokens * wide * hidden
        again = math.ceil(layers / cfg.training.recompute_every)
        return in_flight * (again * kept + (layers - again) * layer) + layer
    if cfg.training.recompute is Recompute.selective:
        layer -= tokens * wide * 2 * groups * sizes.head_dim / tensor
    return in_flight * layers * layer


def advice(cfg: PretrainConfig, shape: RunShape) -> str:
    """The breakdown, and the settings that would lower it, best first; lines for the log."""
    now = estimate(cfg, shape)
    better = sorted(
        (
            (memory.total, change)
            for change, memory in _changes(cfg, shape)
            if memory.total < 0.97 * now.total
        )
    )
    ways = [f"  {change}: {total:.1f} GiB" for total, change in better[:5]]
    return "\n".join(
        [
            f"estimated need of a device: {now}",
            *(["settings that lower it:"] if ways else []),
            *ways,
        ]
    )


def _changes(cfg: PretrainConfig, shape: RunShape) -> Iterator[tuple[str, Memory]]:
    """(setting as one writes it, memory with it) for single changes that are legal."""
    training, parallel = cfg.training, cfg.parallel
    changes: list[tuple[str, PretrainConfig]] = [
        (
            f"training.micro_batch_size={n}",
            replace(cfg, training=replace(training, micro_batch_size=n)),
        )
        for n in {training.micro_batch_size // 2, 1}
        if 0 < n < training.micro_batch_size
    ]
    if training.recompute is not Recompute.full:
        changes.append(
            (
                "training.recompute=full",
                replace(cfg, training=replace(training, recompute=Recompute.full)),
            )
        )
    parallels: dict[str, dict[str, Any]] = {
        f"parallel.zero_stage={stage}": {"zero_stage": stage}
        for stage in (2, 3)
        if stage > shape.zero_stage
    }
    parallels["parallel.offload_optimizer=true"] = {"offload_optimizer": True}
    if parallel.tensor_parallel_size > 1:
        parallels["parallel.sequence_parallel=true"] = {"sequence_parallel": True}
    parallels[f"parallel.tensor_parallel_size={2 * parallel.tensor_parallel_size}"] = {
        "tensor_parallel_size": 2 * parallel.tensor_parallel_size
    }
    changes += [
        (name, replace(cfg, parallel=replace(parallel, **change)))
        for name, change in parallels.items()
    ]
    for name, changed in changes:
        try:
            changed_shape = derive(
                changed, world_size=shape.world_size, tokenizer_vocab_size=shape.vocab_size
            )
        except ConfigError:
            continue
        yield name, estimate(changed, changed_shape)
