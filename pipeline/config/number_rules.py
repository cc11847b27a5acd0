"""Numbers that are illegal whatever the others are; see `rules`."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.training import TrainingConfig

# Least legal value of a number of a run or an evaluation; null is legal where the field allows it.
LEAST = {
    1: """model.num_layers model.hidden_size model.num_attention_heads model.num_query_groups
        model.head_dim model.ffn_hidden_size model.vocab_size model.max_seq_len
        model.moe.ffn_hidden_size model.rope_original_max_seq_len model.mup_base_hidden_size
        model.vision.hidden_size model.vision.num_attention_heads model.vision.ffn_hidden_size
        model.vision.image_size model.vision.patch_size
        parallel.tensor_parallel_size parallel.context_parallel_size
        parallel.pipeline_parallel_size parallel.expert_parallel_size training.total_steps
        training.total_tokens training.seq_len training.global_batch_size
        training.micro_batch_size training.recompute_every training.sample_tokens
        schedule.decay_steps tracking.log_every checkpoint.max_failed_saves
        resilience.spike_window seq_len micro_batch_size""",
    0: """model.moe.num_experts model.moe.shared_expert_ffn_hidden_size model.norm_eps
        model.vision.num_layers model.hidden_dropout model.attention_dropout model.init_std
        model.logit_softcap model.z_loss_coeff model.moe.z_loss_coeff model.moe.aux_loss_coeff
        finetune.lora_rank optimizer.lr optimizer.eps optimizer.weight_decay optimizer.clip_grad
        optimizer.beta1 optimizer.beta2 optimizer.momentum schedule.min_lr
        schedule.warmup_steps schedule.warmup_tokens training.eval_every training.eval_sequences
        training.probe_every training.sample_every training.sample_temperature
        training.gc_every data.prefetch_steps checkpoint.save_every checkpoint.keep_last
        checkpoint.keep_every resilience.hang_timeout_s resilience.straggler_every
        resilience.max_bad_steps resilience.spike_sigmas
        resilience.straggler_ratio sequences""",
}
ABOVE_0 = """model.rope_theta model.rope_scaling_factor resilience.collective_timeout_s
    tracking.peak_tflops"""
BELOW_1 = (
    "model.hidden_dropout model.attention_dropout optimizer.beta1 optimizer.beta2 "
    "optimizer.momentum"
)


def broken_numbers(
    settings: Mapping[str, Any], *, most: float = math.inf
) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of every number that is illegal whatever the others are.

    Args:
        settings: section, or number without one, by name; others are not asked about.
        most: of those that have a least value; of settings from outside.
    """
    at_most = "" if most == math.inf else f" and at most {most}"
    for least, keys in LEAST.items():
        for key, value in _values(settings, keys):
            if not (least <= value <= most and value < math.inf):
                yield key, f"{key} ({value}) must be at least {least}{at_most}."
    for key, value in _values(settings, ABOVE_0):
        if not 0 < value < math.inf:
            yield key, f"{key} ({value}) must be above 0."
    for key, value in _values(settings, BELOW_1):
        if value >= 1:
            yield key, f"{key} ({value}) must be below 1."
    training: TrainingConfig | None = settings.get("training")
    for index, stage in enumerate(training.ramp if training else []):
        for name in ("until_step", "global_batch_size", "seq_len"):
            value = getattr(stage, name)
            if value is not None and value < 1:
                key = f"training.ramp[{index}].{name}"
                yield "ramp", f"{key} ({value}) must be at least 1."


def _values(settings: Mapping[str, Any], keys: str) -> Iterator[tuple[str, float]]:
    """(key, value) of those that are there and not null."""
    for key in keys.split():
        first, *rest = key.split(".")
        if first in settings:
            value = functools.reduce(getattr, rest, settings[first])
            if value is not None:
                yield key, value
