"""The rules between settings: which go together, and the way out where they do not.

    problems(cfg, world_size, vocabulary)            -> every broken rule of a run, in words
    evaluation_problems(evaluation, world_size, ...) -> the same of a model that is only asked

A rule that depends on a number which is itself broken is left out: it could only name a
consequence. Imports no torch and runs before process groups form: an impossible run costs seconds,
not GPU hours.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipeline.config import (
    data_rules,
    layout_rules,
    model_rules,
    name_rules,
    operation_rules,
    privacy_rules,
)
from pipeline.config.choices import Decay, Recompute
from pipeline.config.data import DataConfig
from pipeline.config.evaluation import Evaluation
from pipeline.config.model import ModelConfig
from pipeline.config.number_rules import broken_numbers
from pipeline.config.parallel_sizes import ParallelSizes
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.step_shape import (
    full_seq_len,
    ramp_shapes,
    run_length,
    stages,
    warmup_steps,
)
from pipeline.config.training import ParallelConfig, TrainingConfig
from pipeline.config.upcycling import upcycling
from pipeline.config.vision import CUT, VISION, RowPictures, pictures_fit, vision_cut, vision_fits
from pipeline.errors import ConfigError

Rule = tuple[Iterator[str], set[str], str]
"""A rule, what it needs to be right, and what is not known where it is broken or left out."""
MOST_NAME_BYTES = 255
"""Of a file's name, on every file system that matters."""
# What several rules need to be right.
HEADS = {"model.hidden_size", "model.num_attention_heads", "model.head_dim"}
GROUPS = {"model.num_attention_heads", "model.num_query_groups"}
WIDTHS = {"model.ffn_hidden_size", "model.moe.ffn_hidden_size", "model.hidden_size"}
WIDTHS |= {"model.moe.shared_expert_ffn_hidden_size"}
EXPERTS = {"parallel.expert_parallel_size", "model.moe.num_experts"}
SIZES = {f"parallel.{kind}_parallel_size" for kind in ("tensor", "context", "pipeline")}


def problems(
    cfg: PretrainConfig,
    *,
    world_size: int,
    tokenizer_vocab_size: int | None,
    row_tokens: int | None = None,
    pictures: RowPictures | None = None,
) -> Iterator[str]:
    """Every rule that the settings of a run break, in words.

    Args:
        cfg: the composed config.
        world_size: number of ranks.
        tokenizer_vocab_size: of the training data; None where they cannot be read.
        row_tokens, pictures: of the training data; None: they have none, or cannot be read.
    """
    model, parallel, training = cfg.model, cfg.parallel, cfg.training
    is_dual = layout_rules.is_dual(parallel)
    counts = {"model.num_layers", "model.moe.num_experts"}
    named = counts | HEADS | GROUPS | WIDTHS | {"finetune.lora_rank", "vision"}
    staged = {"stages", "seq_len", "model.vocab_size"}
    batches = {"training.global_batch_size", "training.micro_batch_size"}
    times = {f"schedule.{name}" for name in ("warmup_steps", "warmup_tokens", "decay_steps")}
    times |= {"training.total_steps", "training.total_tokens"}
    counts_tokens = not (training.total_tokens is None and cfg.schedule.warmup_tokens is None)
    budget = {"ramp"} if counts_tokens else set()
    lengths = {"training.seq_len", "model.max_seq_len"}
    rules: list[Rule] = [
        (run_name(cfg.name), set(), ""),
        *_rules_of_a_model(
            model, cfg.data, parallel, is_dual=is_dual, world_size=world_size,
            tokenizer_vocab_size=tokenizer_vocab_size, pictures=pictures,
        ),
        (name_rules.names(cfg), named, ""),
        (upcycling(cfg), named, ""),
        (layout_rules.zero(parallel, training.precision), SIZES, ""),
        (layout_rules.experts_train(parallel), EXPERTS | SIZES, ""),
        (layout_rules.dual_schedule(parallel), SIZES, ""),
        (recompute(training), set(), ""), (privacy_rules.privacy(cfg), SIZES | EXPERTS, ""),
        (layout_rules.heads_are_seen(model, parallel, training.probe_every), set(), ""),
        (model_rules.float8(model, parallel, training), named | SIZES, ""),
        (profile_steps(training), {"training.total_steps"}, ""),
        (
            model_rules.sequence_length(model, "training.seq_len", training.seq_len),
            lengths, "seq_len",
        ),
        (name_rules.stages_train(cfg, tokenizer_vocab_size, pictures), named | SIZES | staged, ""),
        (ramp(cfg, world_size), batches | SIZES | {"seq_len", "data", "ramp"}, "ramp"),
        (
            data_rules.packed_rows(cfg.data, row_tokens, "training.seq_len", full_seq_len(cfg)),
            lengths, "",
        ),
        (data_rules.ramp_of_rows(training, row_tokens), set(), ""),
        (operation_rules.keeps_best(cfg.checkpoint, cfg.data), set(), ""),
        (operation_rules.tracker_is_installed(cfg.tracking), set(), ""),
        (one_length(cfg), set(), "steps"),
        (schedule(cfg), set(), ""),
        (schedule_fits(cfg, world_size), times | {"steps"} | budget, ""),
    ]  # fmt: skip
    yield from _broken(rules, vars(cfg))


def evaluation_problems(
    evaluation: Evaluation,
    *,
    world_size: int,
    tokenizer_vocab_size: int,
    row_tokens: int | None = None,
    pictures: RowPictures | None = None,
) -> Iterator[str]:
    """Every rule that the settings of an evaluation break, in words; arguments as above."""
    model, parallel, seq_len = evaluation.model, evaluation.parallel, evaluation.seq_len
    lengths = {"seq_len", "model.max_seq_len"}
    rules: list[Rule] = [
        *_rules_of_a_model(
            model, evaluation.data, parallel, is_dual=False, world_size=world_size,
            tokenizer_vocab_size=tokenizer_vocab_size, pictures=pictures,
        ),
        (model_rules.sequence_length(model, "seq_len", seq_len), lengths, "length"),
        (layout_rules.sequence_splits(parallel, "seq_len", seq_len), SIZES | {"length"}, ""),
        (data_rules.packed_rows(evaluation.data, row_tokens, "seq_len", seq_len), lengths, ""),
    ]  # fmt: skip
    yield from _broken(rules, vars(evaluation))


def check(
    cfg: PretrainConfig,
    *,
    world_size: int,
    tokenizer_vocab_size: int | None,
    row_tokens: int | None = None,
    pictures: RowPictures | None = None,
) -> None:
    """Raise one ConfigError with every broken rule, each on its own line; arguments as above."""
    found = problems(
        cfg,
        world_size=world_size,
        tokenizer_vocab_size=tokenizer_vocab_size,
        row_tokens=row_tokens,
        pictures=pictures,
    )
    raise_all(found)


def raise_all(found: Iterable[str]) -> None:
    """Raise one ConfigError with every problem on its own line, where there is any."""
    if text := "\n".join(found):
        raise ConfigError(text)


def _rules_of_a_model(
    model: ModelConfig,
    data: DataConfig,
    parallel: ParallelConfig,
    *,
    is_dual: bool,
    world_size: int,
    tokenizer_vocab_size: int | None,
    pictures: RowPictures | None,
) -> list[Rule]:
    """What holds for whoever computes with a model at a layout: a run, and an evaluation.

    is_dual: each rank of the pipeline has two stages.
    """
    stages = SIZES | {"model.num_layers"}
    return [
        (model_rules.head_width_fits(model), HEADS, "head width"),
        (model_rules.rotary_fits(model), {"head width"}, ""),
        (model_rules.groups_fit(model), GROUPS, "groups"),
        (model_rules.architecture(model), set(), ""),
        (model_rules.vocabulary(model, tokenizer_vocab_size), {"model.vocab_size"}, ""),
        (model_rules.tensor_parallel(model, parallel), WIDTHS | EXPERTS | SIZES | {"groups"}, ""),
        (vision_fits(model), VISION, "vision"),
        (pictures_fit(model, pictures), {"vision"}, ""),
        (vision_cut(model, parallel), SIZES | HEADS | CUT, ""),
        (layout_rules.stages_have_layers(model, parallel, is_dual=is_dual), stages, "stages"),
        (layout_rules.sequence_parallel(model, parallel), SIZES, ""),
        (layout_rules.context_parallel(model, parallel), SIZES | HEADS | {"groups"}, ""),
        (data_rules.positions(data), set(), ""),
        (data_rules.held_out(data), set(), ""),
        (layout_rules.whole_copies(parallel, world_size), SIZES, "data"),
        (layout_rules.experts(model, parallel, world_size), EXPERTS | SIZES | {"data"}, ""),
    ]


def _broken(rules: Iterable[Rule], settings: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong, numbers first; no rule is asked about a number that is itself broken."""
    broken = set()
    for key, problem in broken_numbers(settings):
        broken.add(key)
        yield problem
    for rule, needs, gives in rules:
        found = [] if needs & broken else list(rule)
        if found or needs & broken:
            broken.add(gives)
        yield from found


def recompute(training: TrainingConfig) -> Iterator[str]:
    """Which blocks are computed again counts where whole blocks are."""
    if training.recompute is not Recompute.full and training.recompute_every > 1:
        yield (
            f"training.recompute_every ({training.recompute_every}) counts only with "
            "training.recompute=full. Set that, or training.recompute_every=1."
        )


def profile_steps(training: TrainingConfig) -> Iterator[str]:
    """The traced steps are a first and a last one, and come before the end."""
    chosen, end = training.profile_steps, training.total_steps or math.inf
    if chosen is not None and not (len(chosen) == 2 and 1 <= chosen[0] <= chosen[1] <= end):
        yield (
            f"training.profile_steps ({chosen}) must be a first and a last step, 1 <= first <= "
            f"last <= training.total_steps ({training.total_steps}), e.g. [10,12]."
        )


def run_name(name: str) -> Iterator[str]:
    """A run lives in one folder of runs_dir."""
    is_control = any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in name)
    if name.strip() in ("", ".", "..") or set(name) & set("/\\") or "${" in name or is_control:
        yield (
            f"name ({name!r}) must be the name of one folder: not empty, not '..', without '/', a "
            "backslash, '${' and control characters. The run lives in <runs_dir>/<name>: set "
            "another folder with runs_dir=..., and name=gpt2-a."
        )
    elif (size := len(os.fsencode(name))) > MOST_NAME_BYTES:
        yield (
            f"name ({name[:40]}...) has {size} bytes; a folder's name has at most "
            f"{MOST_NAME_BYTES}."
        )


def ramp(cfg: PretrainConfig, world_size: int) -> Iterator[str]:
    """Every stage is cut evenly over ranks, micro-batches and pieces of a sample."""
    seq_len, last = full_seq_len(cfg), 0
    sizes = ParallelSizes.filling(cfg.parallel, world_size=world_size)
    micro, per_pass = cfg.training.micro_batch_size, cfg.training.micro_batch_size * sizes.data
    is_dual = layout_rules.is_dual(cfg.parallel)
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
                f"{section}.seq_len ({length}) must divide the full sequence length ({seq_len}). "
                f"Set {section}.seq_len={math.gcd(length, seq_len)}."
            )
        elif pieces > 1 and batch % (pieces * sizes.data):
            yield (
                f"{name} ({batch}) must be a multiple of {pieces} * data_parallel_size "
                f"({pieces * sizes.data}): each sample of "
                f"{seq_len} tokens becomes {pieces} sequences of {length}. Set "
                f"{name}={math.ceil(batch / (pieces * per_pass)) * pieces * per_pass}."
            )
        yield from layout_rules.sequence_splits(cfg.parallel, f"{section}.seq_len", length)
        if stage.until_step <= last:
            yield (
                f"{section}.until_step ({stage.until_step}) must exceed {last}, where the stage "
                "before it ends."
            )
        last = stage.until_step


def one_length(cfg: PretrainConfig) -> Iterator[str]:
    """A run ends by steps or by tokens."""
    steps, tokens = cfg.training.total_steps, cfg.training.total_tokens
    if (steps is None) == (tokens is None):
        way_out = (
            "Add training.total_steps=null, and the tokens count."
            if steps is not None
            else "Set training.total_steps=1000, or training.total_tokens=1e9."
        )
        yield (
            f"exactly one of training.total_steps ({steps}) and training.total_tokens ({tokens}) "
            f"says how long the run is. {way_out}"
        )


def schedule(cfg: PretrainConfig) -> Iterator[str]:
    """The learning rate's settings among themselves."""
    schedule = cfg.schedule
    if schedule.warmup_tokens is not None and schedule.warmup_steps:
        yield (
            f"schedule.warmup_steps ({schedule.warmup_steps}) and schedule.warmup_tokens "
            f"({schedule.warmup_tokens}) are both set. Set one of them null."
        )
    if schedule.decay_steps is not None and schedule.decay is Decay.constant:
        yield (
            f"schedule.decay=constant has no schedule.decay_steps ({schedule.decay_steps}). Set it "
            "null, or schedule=wsd, which descends at the end."
        )
    if schedule.min_lr > cfg.optimizer.lr:
        yield (
            f"schedule.min_lr ({schedule.min_lr}) must not exceed optimizer.lr "
            f"({cfg.optimizer.lr}). Set schedule.min_lr={cfg.optimizer.lr / 10:g} (a tenth)."
        )


def schedule_fits(cfg: PretrainConfig, world_size: int) -> Iterator[str]:
    """Warm-up and descent end before the run does."""
    total_steps = cfg.training.total_steps
    if total_steps is None:
        sizes = ParallelSizes.filling(cfg.parallel, world_size=world_size)
        total_steps, _ = run_length(cfg.training, ramp_shapes(cfg, sizes))
    warmup, decay = warmup_steps(cfg, total_steps), cfg.schedule.decay_steps
    if warmup > total_steps:
        unit = "steps" if cfg.schedule.warmup_tokens is None else "tokens"
        yield (
            f"schedule.warmup_steps ({warmup}) must not exceed the run's {total_steps} steps. "
            f"Set schedule.warmup_{unit}=null (a tenth of a short run), or more steps."
        )
    elif decay is not None and cfg.schedule.decay is Decay.wsd and warmup + decay > total_steps:
        yield (
            f"schedule.decay_steps ({decay}) plus warm-up ({warmup}) must fit into the run's "
            f"{total_steps} steps. Set schedule.decay_steps={max(1, total_steps - warmup)} or "
            "less, or null: a fifth of the run."
        )
