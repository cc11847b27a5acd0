"""Every number that follows from the config and the world size, computed once.

    derive(cfg, world_size, tokenizer_vocab_size)  --rules-->  ConfigError, or a frozen RunShape

Runs before process groups form and imports no torch: an impossible run costs seconds, no GPU hours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config.choices import Decay, PipelineSchedule, Precision
from pipeline.config.model import ModelConfig
from pipeline.config.parallel_sizes import ParallelSizes
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.rules import check_engine, check_model, require
from pipeline.config.training import ParallelConfig, RampStage

# Rows of the embedding are padded to a multiple of this times tensor_parallel_size: GEMM tiles stay
# full.
VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class StepShape:
    """What one optimizer step consumes."""

    global_batch_size: int
    seq_len: int
    num_micro_batches: int
    num_samples: int
    """Full-length samples; fewer than global_batch_size while a ramp stage shortens sequences."""

    @property
    def tokens(self) -> int:
        """Tokens of the step, all ranks."""
        return self.global_batch_size * self.seq_len


@dataclass(frozen=True)
class RunShape:
    """Derived numbers of a run; frozen."""

    sizes: ParallelSizes
    zero_stage: int
    """The ZeRO stage that runs: parallel.zero_stage, or 0 on one fp32 data-parallel rank."""
    micro_batch_size: int
    global_batch_size: int
    seq_len: int
    vocab_size: int
    padded_vocab_size: int
    total_steps: int
    total_tokens: int
    warmup_steps: int
    ramp: tuple[tuple[int, StepShape], ...]
    """(until_step, shape) in order; the last one has no end (until_step = total_steps)."""

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.sizes.world_size

    def at(self, step: int) -> StepShape:
        """The shape of optimizer step `step` (0 is the first)."""
        return next((shape for until, shape in self.ramp if step < until), self.ramp[-1][1])


def derive(cfg: PretrainConfig, *, world_size: int, tokenizer_vocab_size: int) -> RunShape:
    """The run's derived numbers.

    Args:
        cfg: the composed config.
        world_size: number of ranks (devices).
        tokenizer_vocab_size: of the training datasets' tokenizer.

    Raises:
        ConfigError: two settings contradict each other; the message names them and a legal value.
    """
    model, parallel, training = cfg.model, cfg.parallel, cfg.training
    check_model(model, tensor_parallel_size=parallel.tensor_parallel_size)
    vocab_size = _vocab_size(model, tokenizer_vocab_size)
    sizes = _sizes(parallel, world_size)
    check_engine(cfg)
    seq_len = training.seq_len or model.max_seq_len
    require(
        seq_len <= model.max_seq_len,
        f"training.seq_len ({seq_len}) must not exceed model.max_seq_len ({model.max_seq_len}). "
        f"Set training.seq_len={model.max_seq_len} or model.max_seq_len={seq_len}.",
    )
    ramp = tuple(_ramp(cfg, seq_len, sizes))
    total_steps, total_tokens = _length(cfg, ramp)
    multiple = VOCAB_MULTIPLE * sizes.tensor
    return RunShape(
        sizes=sizes,
        zero_stage=_zero_stage(cfg, sizes),
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        seq_len=seq_len,
        vocab_size=vocab_size,
        padded_vocab_size=math.ceil(vocab_size / multiple) * multiple,
        total_steps=total_steps,
        total_tokens=total_tokens,
        warmup_steps=_warmup_steps(cfg, ramp, total_steps),
        ramp=ramp,
    )


def _vocab_size(model: ModelConfig, tokenizer_vocab_size: int) -> int:
    size = model.vocab_size or tokenizer_vocab_size
    require(
        size >= tokenizer_vocab_size,
        f"model.vocab_size ({size}) is smaller than the datasets' tokenizer "
        f"({tokenizer_vocab_size} ids): ids from {size} up would have no embedding. Set "
        "model.vocab_size=null, or prepare the data with a tokenizer that fits.",
    )
    return size


def _sizes(parallel: ParallelConfig, world_size: int) -> ParallelSizes:
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        require(
            getattr(parallel, name) >= 1,
            f"parallel.{name} ({getattr(parallel, name)}) must be at least 1.",
        )
    sizes = ParallelSizes.filling(parallel, world_size=world_size)
    more = ParallelSizes.of(parallel, data=sizes.data + 1)
    require(
        sizes.world_size == world_size,
        f"the number of ranks ({world_size}) must be a multiple of parallel.tensor_parallel_size * "
        f"parallel.pipeline_parallel_size ({sizes.tensor} * {sizes.pipeline} = "
        f"{sizes.ranks_per_copy}). Start {more.world_size} ranks, or choose sizes that divide "
        f"{world_size}.",
    )
    return sizes


def _zero_stage(cfg: PretrainConfig, sizes: ParallelSizes) -> int:
    """Stage 0 where one rank holds all of an fp32 model: it computes the same as parallel.zero_stage
    without copying gradients and weights through flat buffers.
    """
    is_alone = sizes.data == sizes.pipeline == 1 and not cfg.parallel.offload_optimizer
    is_fp32 = cfg.training.precision is Precision.fp32
    return 0 if is_alone and is_fp32 else cfg.parallel.zero_stage


def _ramp(
    cfg: PretrainConfig, seq_len: int, sizes: ParallelSizes
) -> Iterator[tuple[int, StepShape]]:
    training, last = cfg.training, 0
    stages = [*training.ramp, RampStage(until_step=2**62)]
    minimum = 2 * sizes.pipeline
    for index, stage in enumerate(stages):
        batch, length = (
            stage.global_batch_size or training.global_batch_size,
            stage.seq_len or seq_len,
        )
        name = (
            "training.global_batch_size"
            if index == len(stages) - 1
            else f"training.ramp[{index}].global_batch_size"
        )
        per_pass = training.micro_batch_size * sizes.data
        require(
            per_pass >= 1,
            f"training.micro_batch_size ({training.micro_batch_size}) must be at least 1.",
        )
        require(
            batch % per_pass == 0 and batch > 0,
            f"{name} ({batch}) must be a multiple of training.micro_batch_size * "
            f"data_parallel_size ({training.micro_batch_size} * {sizes.data} = "
            f"{per_pass}). Set {name}={max(1, math.ceil(batch / per_pass)) * per_pass}.",
        )
        require(
            length >= 1 and seq_len % length == 0,
            f"training.ramp[{index}].seq_len ({length}) must divide the full sequence length "
            f"({seq_len}).",
        )
        pieces = seq_len // length
        require(
            batch % (pieces * sizes.data) == 0 or pieces == 1,
            f"{name} ({batch}) must be a multiple of {pieces} * data_parallel_size "
            f"({pieces * sizes.data}): each sample of "
            f"{seq_len} tokens becomes {pieces} sequences of {length}.",
        )
        require(
            stage.until_step > last,
            f"training.ramp[{index}].until_step ({stage.until_step}) must exceed {last}.",
        )
        micro_batches = batch // per_pass
        require(
            cfg.parallel.pipeline_schedule is not PipelineSchedule["dualpipev"]
            or micro_batches >= minimum,
            f"parallel.pipeline_schedule=dualpipev needs at least {minimum} micro-batches (2 * "
            f"pipeline_parallel_size), not {micro_batches}. "
            f"Set {name}={minimum * per_pass}, or parallel.pipeline_schedule=1f1b.",
        )
        last = stage.until_step
        yield stage.until_step, StepShape(batch, length, micro_batches, batch // pieces)


def _length(cfg: PretrainConfig, ramp: tuple[tuple[int, StepShape], ...]) -> tuple[int, int]:
    """(total_steps, total_tokens) from whichever of the two is set."""
    steps, tokens = cfg.training.total_steps, cfg.training.total_tokens
    require(
        (steps is None) != (tokens is None),
        f"set exactly one of training.total_steps ({steps}) and training.total_tokens ({tokens}); "
        "the other is null.",
    )
    step_count, token_count, start = 0, 0, 0
    for until, shape in ramp:
        room = until - start
        if steps is not None:
            take = min(room, steps - step_count)
        else:
            assert tokens is not None
            take = min(room, max(0, math.ceil((tokens - token_count) / shape.tokens)))
        step_count, token_count, start = step_count + take, token_count + take * shape.tokens, until
    require(step_count >= 1, f"the run has no step: total_steps={steps}, total_tokens={tokens}.")
    return step_count, token_count


def _warmup_steps(
    cfg: PretrainConfig, ramp: tuple[tuple[int, StepShape], ...], total_steps: int
) -> int:
    schedule = cfg.schedule
    warmup = schedule.warmup_steps
    if schedule.warmup_tokens is not None:
        require(warmup == 0, "set only one of schedule.warmup_steps and schedule.warmup_tokens.")
        shape = ramp[-1][1]
        warmup = math.ceil(schedule.warmup_tokens / shape.tokens)
    require(
        warmup <= total_steps,
        f"schedule.warmup_steps ({warmup}) must not exceed the run's {total_steps} steps.",
    )
    decay = schedule.decay_steps
    if decay is not None:
        require(
            decay >= 1 and (schedule.decay is not Decay.wsd or warmup + decay <= total_steps),
            f"schedule.decay_steps ({decay}) plus warm-up ({warmup}) must fit into the run's "
            f"{total_steps} steps.",
        )
        require(
            schedule.decay is not Decay.constant,
            "schedule.decay=constant has no schedule.decay_steps; set it null.",
        )
    require(
        cfg.schedule.min_lr <= cfg.optimizer.lr,
        f"schedule.min_lr ({schedule.min_lr}) must not exceed optimizer.lr ({cfg.optimizer.lr}).",
    )
    return warmup
