"""Where differential privacy would not hold, and why; see `rules`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator

from pipeline.config.choices import Float8, OnSpike, OptimizerName, Precision
from pipeline.config.finetune import PrivacyConfig
from pipeline.config.pretrain import PretrainConfig

LIBRARIES = {"opacus": "the accountant of Opacus", "cryptography": "the cipher of its noise"}


def privacy(cfg: PretrainConfig) -> Iterator[str]:
    """The settings of finetune.dp, and what they do not go with."""
    dp = cfg.finetune.dp
    if dp.clip_norm is None:
        if dp != PrivacyConfig():
            yield (
                "finetune.dp.noise_multiplier and finetune.dp.delta count only with "
                "finetune.dp.clip_norm. Set it, for example finetune.dp.clip_norm=1.0."
            )
        return
    if not (0 < dp.clip_norm < math.inf and 0 < dp.noise_multiplier < math.inf):
        yield (
            f"finetune.dp.clip_norm ({dp.clip_norm}) and finetune.dp.noise_multiplier "
            f"({dp.noise_multiplier}) must be above 0: without noise nothing is private."
        )
    if not 0 < dp.delta < 1:
        yield (
            f"finetune.dp.delta ({dp.delta}) must be above 0 and below 1, and well below one over "
            "the number of sequences."
        )
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        yield (
            f"finetune.dp.clip_norm needs {' and '.join(map(LIBRARIES.__getitem__, missing))}: "
            f'{", ".join(missing)} is not installed. pip install -e ".[privacy]".'
        )
    for setting, why, way_out in (*_layouts(cfg), *_steps(cfg)):
        yield f"finetune.dp.clip_norm does not go with {setting}: {why}. Set {way_out}."


def delta(dp: PrivacyConfig, sequences: int) -> Iterator[str]:
    """finetune.dp.delta beside what it is a chance of, once the number of sequences is known."""
    if dp.clip_norm is not None and dp.delta * sequences >= 1:
        yield (
            f"finetune.dp.delta ({dp.delta:g}) must be below one over the {sequences:,} sequences "
            f"of the training data ({1 / sequences:.1e}): a program that publishes one of them "
            "whole would keep the promise. Set finetune.dp.delta="
            f"{10.0 ** math.floor(math.log10(0.5 / sequences)):.0e}."
        )


def _layouts(cfg: PretrainConfig) -> Iterator[tuple[str, str, str]]:
    """(setting of the layout, why the clipped sum would not be exact, way out)."""
    parallel = cfg.parallel
    if parallel.pipeline_parallel_size > 1:
        yield (
            f"parallel.pipeline_parallel_size={parallel.pipeline_parallel_size}",
            "a sequence's norm adds up over all stages, which are at different sequences when each "
            "has to know it",
            "parallel.pipeline_parallel_size=1, and share the model by tensor parallelism",
        )
    if parallel.context_parallel_size > 1:
        yield (
            f"parallel.context_parallel_size={parallel.context_parallel_size}",
            "a rank has the gradient of a part of each sequence only",
            "parallel.context_parallel_size=1",
        )
    if parallel.zero_stage == 3:
        yield (
            "parallel.zero_stage=3",
            "weights are gathered by the passes of its own engine alone, and norms are taken in "
            "another",
            "parallel.zero_stage=2",
        )
    if parallel.offload_optimizer:
        yield (
            "parallel.offload_optimizer=true",
            "noise is added where the gradients are, and they have left the device",
            "parallel.offload_optimizer=false",
        )


def _steps(cfg: PretrainConfig) -> Iterator[tuple[str, str, str]]:
    """(setting of model or step, why privacy would not hold, way out)."""
    training, model = cfg.training, cfg.model
    if model.moe.num_experts:
        yield (
            f"model.moe.num_experts={model.moe.num_experts}",
            "the load-balancing loss couples the sequences of a batch, so that none has a gradient "
            "of its own",
            "model.moe.num_experts=0",
        )
    if model.hidden_dropout or model.attention_dropout:
        yield (
            f"model.hidden_dropout={model.hidden_dropout}, "
            f"model.attention_dropout={model.attention_dropout}",
            "the norm is taken in one pass and the gradient in another, under another mask",
            "both 0",
        )
    if model.vision.num_layers:
        yield "model.vision", "norms of pictures' gradients are not tested", "a model of text"
    if training.precision is Precision.fp16:
        yield "training.precision=fp16", "a step that overflows is repeated", "bf16 or fp32"
    if training.fp8 is not Float8.none:
        yield f"training.fp8={training.fp8.name}", "it is not tested", "training.fp8=none"
    if cfg.optimizer.name is OptimizerName.muon:
        yield "optimizer.name=muon", "it is not tested", "optimizer=adamw"
    if cfg.optimizer.clip_grad:
        yield (
            f"optimizer.clip_grad={cfg.optimizer.clip_grad}",
            "it would scale the step by the norm from before the noise, which is a secret",
            "optimizer.clip_grad=0: each sequence is clipped",
        )
    if cfg.resilience.on_spike is not OnSpike.none:
        yield (
            f"resilience.on_spike={cfg.resilience.on_spike.name}",
            "which steps are left out would tell of the data",
            "resilience.on_spike=none",
        )
    if training.ramp:
        yield "training.ramp", "the noise is that of one batch size", "training.ramp=[]"
    if cfg.data.allow_dataset_change:
        yield (
            "data.allow_dataset_change=true",
            "how often a sequence was read is known from one order alone",
            "data.allow_dataset_change=false",
        )
