"""A run in words: what its log and its preflight say first.

settings, RunShape --> sentences, one for each subject
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.layout_rules import largest_context
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape
from pipeline.config.step_shape import WARMUP_STEPS
from pipeline.log import in_units
from pipeline.planning.flops import count_parameters
from pipeline.planning.job import Job
from pipeline.planning.memory import PARTS, memory_of_stages, most_loaded

LONG = 16384
"""Tokens of a sequence that ranks may well share."""


def sentences(cfg: PretrainConfig, shape: RunShape) -> Iterator[str]:
    """What is trained, by how many, in which steps, and what a rank of them holds."""
    counts = count_parameters(cfg.model, cfg.finetune, shape.vocab_size)
    sizes, step = shape.sizes, shape.at(shape.total_steps)
    trained, every = counts["num_trained_parameters"], counts["num_parameters"]
    yield f"model {cfg.model.name}: {every:,} parameters" + (
        f", {trained:,} of them trained" if trained < every else ""
    )
    split = {"data": sizes.data, "pipeline": sizes.pipeline, "tensor": sizes.tensor}
    if sizes.context > 1:
        split = {"data": sizes.data, "context": sizes.context, **split}
    ranks = " x ".join(f"{size} {name}" for name, size in split.items())
    yield (
        f"{_count(shape.world_size, 'rank')} = {ranks} parallel; ZeRO-{shape.zero_stage}, "
        f"{cfg.training.precision.name}"
    )
    if sizes.context > 1 or shape.seq_len >= LONG:
        lengths = {shape.seq_len, *(stage.seq_len for _, stage in shape.ramp)}
        most = largest_context(cfg.model, cfg.parallel, lengths)
        yield (
            f"sequences of {shape.seq_len:,} tokens, {shape.seq_len // sizes.context:,} on a rank: "
            f"parallel.context_parallel_size={sizes.context}, at most {most}"
        )
    yield f"{shape.total_steps:,} steps, {shape.total_tokens:,} tokens"
    yield (
        f"a step: {step.global_batch_size:,} sequences of {step.seq_len:,} tokens, "
        f"{step.num_micro_batches} x {shape.micro_batch_size} a data-parallel rank"
    )
    schedule = cfg.schedule
    if schedule.warmup_steps is schedule.warmup_tokens is None:
        short = ", a tenth of a short run" if shape.warmup_steps < WARMUP_STEPS else ""
        yield f"warm-up: {_count(shape.warmup_steps, 'step')}{short} (schedule.warmup_steps=N)"
    job = Job.of(cfg, shape)
    worst = most_loaded(memory_of_stages(job))
    parts = ", ".join(f"{part} {in_units(getattr(worst, part))}" for part in PARTS)
    where = f"a rank of stage {worst.stage}" if sizes.pipeline > 1 else "a rank"
    yield f"{where} holds about {in_units(worst.tensors)}: {parts}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
