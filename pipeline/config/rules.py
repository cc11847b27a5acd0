"""The rules between settings: which go together, and the way out where they do not.

Imports no torch and runs before process groups form: an impossible run costs seconds, no GPU hours.
"""

from __future__ import annotations

from pipeline.config.choices import (
    NormPlacement,
    PipelineSchedule,
    Position,
    Precision,
    Recompute,
    RopeScaling,
)
from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import ffn_width, head_width
from pipeline.config.pretrain import PretrainConfig
from pipeline.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def check_model(model: ModelConfig, *, tensor_parallel_size: int) -> None:
    """Raise ConfigError where the architecture contradicts itself or the tensor-parallel size."""
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    tensor = tensor_parallel_size
    for name in ("num_layers", "hidden_size", "num_attention_heads", "max_seq_len"):
        require(
            getattr(model, name) >= 1, f"model.{name} ({getattr(model, name)}) must be at least 1."
        )
    require(
        model.head_dim is not None or model.hidden_size % heads == 0,
        f"model.hidden_size ({model.hidden_size}) must be a multiple of model.num_attention_heads "
        f"({heads}), or set model.head_dim. Nearest width: "
        f"{round(model.hidden_size / heads) * heads}.",
    )
    require(
        heads % groups == 0,
        f"model.num_attention_heads ({heads}) must be a multiple of model.num_query_groups "
        f"({groups}).",
    )
    for name, value in (
        ("num_attention_heads", heads),
        ("num_query_groups", groups),
        ("ffn_hidden_size", ffn_width(model)),
    ):
        legal = [
            t
            for t in range(1, tensor)
            if heads % t == 0 and groups % t == 0 and ffn_width(model) % t == 0
        ]
        require(
            value % tensor == 0,
            f"model.{name} ({value}) must be divisible by parallel.tensor_parallel_size "
            f"({tensor}). Largest size that fits this model: {max(legal, default=1)}.",
        )
    rope = model.position is Position.rope
    require(
        not rope or head_width(model) % 2 == 0,
        f"rotary positions need an even head_dim, not {head_width(model)}.",
    )
    require(
        rope or model.rope_scaling is RopeScaling.none,
        f"model.rope_scaling={model.rope_scaling.name} has no effect with "
        f"model.position={model.position.name}. "
        "Set model.position=rope or model.rope_scaling=none.",
    )
    require(
        not (model.parallel_residual and model.norm_placement is NormPlacement.post),
        "model.parallel_residual=true needs model.norm_placement=pre: "
        "a parallel block has one sum to normalise before.",
    )
    moe = model.moe
    if moe.num_experts:
        require(
            1 <= moe.top_k <= moe.num_experts,
            f"model.moe.top_k ({moe.top_k}) must be between 1 and model.moe.num_experts "
            f"({moe.num_experts}).",
        )
        require(
            not model.bias,
            "mixture-of-experts layers have no biases: "
            "set model.bias=false (model.qkv_bias=true keeps the attention's).",
        )


def check_engine(cfg: PretrainConfig) -> None:
    """Which parallel layouts, precisions and schedules go together."""
    model, parallel, training = cfg.model, cfg.parallel, cfg.training
    stage, pipeline = parallel.zero_stage, parallel.pipeline_parallel_size
    dualpipev = parallel.pipeline_schedule is PipelineSchedule["dualpipev"]
    require(stage in (0, 1, 2, 3), f"parallel.zero_stage ({stage}) must be 0, 1, 2 or 3.")
    require(
        pipeline == 1 or stage == 1,
        f"parallel.zero_stage={stage} does not work with "
        f"parallel.pipeline_parallel_size={pipeline}: DeepSpeed's pipeline keeps whole gradients "
        "across micro-batches (stages 2 and 3 refuse) and clips wrongly at stage 0. Set "
        "parallel.zero_stage=1 or parallel.pipeline_parallel_size=1.",
    )
    require(
        stage != 0 or training.precision is Precision.fp32,
        "parallel.zero_stage=0 works with training.precision=fp32 only: with "
        f"{training.precision.name} DeepSpeed 0.19 computes a wrong gradient norm under tensor "
        "parallelism. Set parallel.zero_stage=1.",
    )
    require(
        pipeline > 1 or not dualpipev,
        "parallel.pipeline_schedule=dualpipev needs parallel.pipeline_parallel_size of at least 2.",
    )
    groups = pipeline * 2 if dualpipev else pipeline
    require(
        model.num_layers >= groups,
        f"model.num_layers ({model.num_layers}) must be at least the number of pipeline stages "
        f"({groups}{', two per rank with dualpipev' if dualpipev else ''}). Largest "
        "parallel.pipeline_parallel_size that fits: "
        f"{model.num_layers // (2 if dualpipev else 1)}.",
    )
    require(
        not parallel.sequence_parallel or parallel.tensor_parallel_size > 1,
        "parallel.sequence_parallel=true has no effect with parallel.tensor_parallel_size=1. "
        "Set it false.",
    )
    require(
        not model.moe.num_experts
        or parallel.tensor_parallel_size == 1
        or parallel.sequence_parallel,
        f"experts under parallel.tensor_parallel_size={parallel.tensor_parallel_size} need "
        "parallel.sequence_parallel=true: "
        "megatron-core routes each token once, on the rank that holds it.",
    )
    require(
        not (parallel.offload_optimizer and stage == 0),
        "parallel.offload_optimizer=true needs parallel.zero_stage of 1 to 3.",
    )
    require(
        not (parallel.offload_optimizer and pipeline > 1),
        "parallel.offload_optimizer=true needs parallel.pipeline_parallel_size=1.",
    )
    require(
        not cfg.data.reset_positions or cfg.data.mask_documents,
        "data.reset_positions=true needs data.mask_documents=true.",
    )
    require(
        training.recompute is Recompute.full or training.recompute_every == 1,
        f"training.recompute_every ({training.recompute_every}) counts only with "
        "training.recompute=full.",
    )
