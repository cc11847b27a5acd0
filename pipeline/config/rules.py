"""The rules between settings: which go together, and the way out where they do not.

    problems(cfg, world_size, vocabulary) -> every broken rule in words, all at once

A rule that depends on a number which is itself broken is left out: it could only name a
consequence. Imports no torch and runs before process groups form: an impossible run costs seconds,
not GPU hours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

from pipeline.config import model_rules, name_rules
from pipeline.config.choices import Decay, PipelineSchedule, Precision, Recompute
from pipeline.config.parallel_sizes import ParallelSizes
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.step_shape import (
    full_seq_len,
    ramp_shapes,
    run_length,
    stages,
    warmup_steps,
)
from pipeline.config.training import ParallelConfig
from pipeline.errors import ConfigError

# Least legal value of a number; null is legal where the field allows it.
LEAST = {
    1: """model.num_layers model.hidden_size model.num_attention_heads model.num_query_groups
        model.head_dim model.ffn_hidden_size model.vocab_size model.max_seq_len
        model.moe.ffn_hidden_size parallel.tensor_parallel_size parallel.pipeline_parallel_size
        training.total_steps training.total_tokens training.seq_len training.global_batch_size
        training.micro_batch_size training.recompute_every schedule.decay_steps
        tracking.log_every checkpoint.max_failed_saves""",
    0: """model.moe.num_experts model.moe.shared_expert_ffn_hidden_size model.norm_eps
        model.hidden_dropout model.attention_dropout model.init_std model.logit_softcap
        finetune.lora_rank
        optimizer.lr optimizer.eps optimizer.weight_decay optimizer.clip_grad schedule.min_lr
        schedule.warmup_steps schedule.warmup_tokens training.eval_every training.eval_sequences
        training.gc_every data.prefetch_steps checkpoint.save_every checkpoint.keep_last
        checkpoint.keep_every resilience.hang_timeout_s resilience.straggler_every""",
}


def problems(
    cfg: PretrainConfig,
    *,
    world_size: int,
    tokenizer_vocab_size: int | None,
    row_tokens: int | None = None,
) -> Iterator[str]:
    """Every rule that the settings break, in words.

    Args:
        cfg: the composed config.
        world_size: number of ranks.
        tokenizer_vocab_size: of the training data; None where they cannot be read.
        row_tokens: of packed training data; None: they are text, or cannot be read.
    """
    broken = set()
    for key, problem in broken_numbers(cfg):
        broken.add(key)
        yield problem
    model, parallel = cfg.model, cfg.parallel
    heads = {"model.hidden_size", "model.num_attention_heads", "model.head_dim"}
    groups = {"model.num_attention_heads", "model.num_query_groups"}
    widths = {"model.ffn_hidden_size", "model.moe.ffn_hidden_size", "model.hidden_size"}
    counts = {"model.num_layers", "model.moe.num_experts"}
    named = counts | heads | groups | widths | {"finetune.lora_rank"}
    staged = {"stages", "seq_len", "model.vocab_size"}
    sizes = {"parallel.tensor_parallel_size", "parallel.pipeline_parallel_size"}
    lengths = {"training.seq_len", "model.max_seq_len"}
    batches = {"training.global_batch_size", "training.micro_batch_size"}
    times = {f"schedule.{name}" for name in ("warmup_steps", "warmup_tokens", "decay_steps")}
    times |= {"training.total_steps", "training.total_tokens"}
    counts_tokens = not (cfg.training.total_tokens is None and cfg.schedule.warmup_tokens is None)
    budget = {"ramp"} if counts_tokens else set()
    # rule, what it needs to be right, and what is not known where it is broken or left out
    rules: list[tuple[Iterator[str], set[str], str]] = [
        (run_name(cfg.name), set(), ""),
        (model_rules.head_width_fits(model), heads, "head width"),
        (model_rules.rotary_fits(model), {"head width"}, ""),
        (model_rules.groups_fit(model), groups, "groups"),
        (model_rules.architecture(model), set(), ""),
        (model_rules.vocabulary(model, tokenizer_vocab_size), {"model.vocab_size"}, ""),
        (model_rules.tensor_parallel(model, parallel), widths | sizes | {"groups"}, ""),
        (name_rules.names(cfg), named, ""),
        (zero(cfg), sizes, ""),
        (pipeline_stages(cfg), sizes | {"model.num_layers"}, "stages"),
        (effects(cfg), sizes, ""),
        (layout(parallel, world_size), sizes, "data"),
        (sequence_length(cfg), lengths, "seq_len"),
        (name_rules.stages_train(cfg, tokenizer_vocab_size), named | sizes | staged, ""),
        (ramp(cfg, world_size), batches | {"seq_len", "data", "ramp"}, "ramp"),
        (packed_rows(cfg, row_tokens), lengths, ""),
        (one_length(cfg), set(), "steps"),
        (schedule(cfg), set(), ""),
        (schedule_fits(cfg, world_size), times | {"steps"} | budget, ""),
    ]
    for rule, needs, gives in rules:
        found = [] if needs & broken else list(rule)
        if found or needs & broken:
            broken.add(gives)
        yield from found


def check(
    cfg: PretrainConfig,
    *,
    world_size: int,
    tokenizer_vocab_size: int | None,
    row_tokens: int | None = None,
) -> None:
    """Raise one ConfigError with every broken rule, each on its own line; arguments as above."""
    found = problems(
        cfg,
        world_size=world_size,
        tokenizer_vocab_size=tokenizer_vocab_size,
        row_tokens=row_tokens,
    )
    if text := "\n".join(found):
        raise ConfigError(text)


def broken_numbers(cfg: PretrainConfig) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of every number that is illegal whatever the others are."""
    for least, keys in LEAST.items():
        for key in keys.split():
            section, _, name = key.rpartition(".")
            owner = functools.reduce(getattr, section.split("."), cfg)
            value = getattr(owner, name)
            if value is not None and not least <= value < math.inf:
                yield key, f"{key} ({value}) must be at least {least}."
    for index, stage in enumerate(cfg.training.ramp):
        for name in ("until_step", "global_batch_size", "seq_len"):
            value = getattr(stage, name)
            if value is not None and value < 1:
                key = f"training.ramp[{index}].{name}"
                yield "ramp", f"{key} ({value}) must be at least 1."


def zero(cfg: PretrainConfig) -> Iterator[str]:
    """Which layouts and precisions a ZeRO stage goes with."""
    stage, pipeline = cfg.parallel.zero_stage, cfg.parallel.pipeline_parallel_size
    if stage not in (0, 1, 2, 3):
        yield f"parallel.zero_stage ({stage}) must be 0, 1, 2 or 3."
    elif pipeline > 1 and stage != 1:
        yield (
            f"parallel.zero_stage={stage} does not work with "
            f"parallel.pipeline_parallel_size={pipeline}: DeepSpeed's pipeline keeps whole "
            "gradients across micro-batches (stages 2 and 3 refuse) and clips wrongly at stage 0. "
            "Set parallel.zero_stage=1 or parallel.pipeline_parallel_size=1."
        )
    precision = cfg.training.precision
    if stage == 0 and precision is not Precision.fp32:
        yield (
            "parallel.zero_stage=0 works with training.precision=fp32 only: with "
            f"{precision.name} DeepSpeed 0.19 computes a wrong gradient norm under tensor "
            "parallelism. Set parallel.zero_stage=1."
        )
    if cfg.parallel.offload_optimizer and stage == 0:
        yield "parallel.offload_optimizer=true needs parallel.zero_stage of 1 to 3."
    if cfg.parallel.offload_optimizer and pipeline > 1:
        yield "parallel.offload_optimizer=true needs parallel.pipeline_parallel_size=1."


def pipeline_stages(cfg: PretrainConfig) -> Iterator[str]:
    """Every stage has a layer."""
    num_layers, pipeline = cfg.model.num_layers, cfg.parallel.pipeline_parallel_size
    is_dual = cfg.parallel.pipeline_schedule is PipelineSchedule["dualpipev"]
    per_rank = 2 if is_dual else 1
    if is_dual and pipeline == 1:
        yield (
            "parallel.pipeline_schedule=dualpipev needs parallel.pipeline_parallel_size of at "
            "least 2."
        )
    if num_layers < per_rank * pipeline:
        yield (
            f"model.num_layers ({num_layers}) must be at least the number of pipeline stages "
            f"({per_rank * pipeline}{', two per rank with dualpipev' if is_dual else ''}). "
            f"Largest parallel.pipeline_parallel_size that fits: {num_layers // per_rank}."
        )


def effects(cfg: PretrainConfig) -> Iterator[str]:
    """Settings that do nothing, or the wrong thing, without another one."""
    parallel, training = cfg.parallel, cfg.training
    tensor = parallel.tensor_parallel_size
    if parallel.sequence_parallel and tensor == 1:
        yield (
            "parallel.sequence_parallel=true has no effect with parallel.tensor_parallel_size=1. "
            "Set it false."
        )
    if cfg.model.moe.num_experts and tensor > 1 and not parallel.sequence_parallel:
        yield (
            f"experts under parallel.tensor_parallel_size={tensor} need "
            "parallel.sequence_parallel=true: "
            "megatron-core routes each token once, on the rank that holds it."
        )
    if cfg.data.reset_positions and not cfg.data.mask_documents:
        yield "data.reset_positions=true needs data.mask_documents=true."
    if training.recompute is not Recompute.full and training.recompute_every > 1:
        yield (
            f"training.recompute_every ({training.recompute_every}) counts only with "
            "training.recompute=full."
        )


def run_name(name: str) -> Iterator[str]:
    """A run lives in one folder of runs_dir."""
    if name.strip() in ("", ".", "..") or set(name) & set("/\\\0\n") or "${" in name:
        yield (
            f"name ('{name}') must be the name of one folder: not empty, not '..', without '/', a "
            "backslash and '${'. The run lives in <runs_dir>/<name>: set another folder with "
            "runs_dir=..., and name=gpt2-a."
        )


def layout(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    """The ranks make whole copies of the model."""
    sizes = ParallelSizes.filling(parallel, world_size=world_size)
    more = ParallelSizes.of(parallel, data=sizes.data + 1)
    if sizes.world_size != world_size:
        yield (
            f"the number of ranks ({world_size}) must be a multiple of "
            "parallel.tensor_parallel_size * parallel.pipeline_parallel_size "
            f"({sizes.tensor} * {sizes.pipeline} = {sizes.ranks_per_copy}). Start "
            f"{more.world_size} ranks, or choose sizes that divide {world_size}."
        )


def sequence_length(cfg: PretrainConfig) -> Iterator[str]:
    """Positions are known up to the longest sequence."""
    seq_len, longest = full_seq_len(cfg), cfg.model.max_seq_len
    if seq_len > longest:
        yield (
            f"training.seq_len ({seq_len}) must not exceed model.max_seq_len ({longest}). "
            f"Set training.seq_len={longest} or model.max_seq_len={seq_len}."
        )


def ramp(cfg: PretrainConfig, world_size: int) -> Iterator[str]:
    """Every stage is cut evenly over ranks, micro-batches and pieces of a sample."""
    seq_len, last = full_seq_len(cfg), 0
    sizes = ParallelSizes.filling(cfg.parallel, world_size=world_size)
    micro, per_pass = cfg.training.micro_batch_size, cfg.training.micro_batch_size * sizes.data
    is_dual = cfg.parallel.pipeline_schedule is PipelineSchedule["dualpipev"]
    for section, stage in stages(cfg):
        name, batch, length = f"{section}.global_batch_size", stage.global_batch_size, stage.seq_len
        assert batch is not None and length is not None
        pieces = max(1, seq_len // length)
        if batch % per_pass:
            yield (
                f"{name} ({batch}) must be a multiple of training.micro_batch_size * "
                f"data_parallel_size ({micro} * {sizes.data} = {per_pass}). "
                f"Set {name}={math.ceil(batch / per_pass) * per_pass}."
            )
        elif is_dual and batch // per_pass < 2 * sizes.pipeline:
            yield (
                f"parallel.pipeline_schedule=dualpipev needs at least {2 * sizes.pipeline} "
                f"micro-batches (2 * pipeline_parallel_size), not {batch // per_pass}. Set "
                f"{name}={2 * sizes.pipeline * per_pass}, or parallel.pipeline_schedule=1f1b."
            )
        if seq_len % length:
            yield (
                f"{section}.seq_len ({length}) must divide the full sequence length ({seq_len})."
            )
        elif pieces > 1 and batch % (pieces * sizes.data):
            yield (
                f"{name} ({batch}) must be a multiple of {pieces} * data_parallel_size "
                f"({pieces * sizes.data}): each sample of "
                f"{seq_len} tokens becomes {pieces} sequences of {length}."
            )
        if stage.until_step <= last:
            yield f"{section}.until_step ({stage.until_step}) must exceed {last}."
        last = stage.until_step


def packed_rows(cfg: PretrainConfig, row_tokens: int | None) -> Iterator[str]:
    """A sequence of packed data is a row, whole and with its own mask."""
    if row_tokens is None:
        return
    if full_seq_len(cfg) != row_tokens:
        yield (
            f"the data are packed in rows of {row_tokens} tokens, and training.seq_len is "
            f"{full_seq_len(cfg)}. Set training.seq_len={row_tokens} (model.max_seq_len at "
            f"least that), or prepare the data again with row_tokens={full_seq_len(cfg)}."
        )
    if any(stage.seq_len not in (None, row_tokens) for stage in cfg.training.ramp):
        yield (
            "training.ramp[].seq_len would cut packed rows in the middle of a dialogue. Leave it "
            "out; global_batch_size may ramp."
        )
    if cfg.data.mask_eod_loss:
        yield (
            "data.mask_eod_loss=true has no effect on packed rows, which say themselves what is "
            "learned. Set it false."
        )


def one_length(cfg: PretrainConfig) -> Iterator[str]:
    """A run ends by steps or by tokens."""
    steps, tokens = cfg.training.total_steps, cfg.training.total_tokens
    if (steps is None) == (tokens is None):
        yield (
            f"set exactly one of training.total_steps ({steps}) and training.total_tokens "
            f"({tokens}); the other is null."
        )


def schedule(cfg: PretrainConfig) -> Iterator[str]:
    """The learning rate's settings among themselves."""
    schedule = cfg.schedule
    if schedule.warmup_tokens is not None and schedule.warmup_steps:
        yield "set only one of schedule.warmup_steps and schedule.warmup_tokens."
    if schedule.decay_steps is not None and schedule.decay is Decay.constant:
        yield "schedule.decay=constant has no schedule.decay_steps; set it null."
    if schedule.min_lr > cfg.optimizer.lr:
        yield (
            f"schedule.min_lr ({schedule.min_lr}) must not exceed optimizer.lr "
            f"({cfg.optimizer.lr})."
        )


def schedule_fits(cfg: PretrainConfig, world_size: int) -> Iterator[str]:
    """Warm-up and descent end before the run does."""
    total_steps = cfg.training.total_steps
    if total_steps is None:
        sizes = ParallelSizes.filling(cfg.parallel, world_size=world_size)
        total_steps, _ = run_length(cfg.training, ramp_shapes(cfg, sizes))
    warmup, decay = warmup_steps(cfg), cfg.schedule.decay_steps
    if warmup > total_steps:
        yield f"schedule.warmup_steps ({warmup}) must not exceed the run's {total_steps} steps."
    if decay is not None and cfg.schedule.decay is Decay.wsd and warmup + decay > total_steps:
        yield (
            f"schedule.decay_steps ({decay}) plus warm-up ({warmup}) must fit into the run's "
            f"{total_steps} steps."
        )
