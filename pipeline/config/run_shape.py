"""Every number that follows from the config and the world size, computed once.

    derive(cfg, world_size, tokenizer_vocab_size)  --rules-->  ConfigError, or a frozen RunShape
    derive_evaluation(evaluation, ...)             --rules-->  ConfigError, or a ForwardShape

Runs before process groups form and imports no torch: an impossible run costs seconds, no GPU hours.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import rules
from pipeline.config.choices import Precision
from pipeline.config.evaluation import Evaluation
from pipeline.config.model import ModelConfig
from pipeline.config.parallel_sizes import ParallelSizes
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.stages import pad_vocabulary
from pipeline.config.step_shape import (
    Ramp,
    StepShape,
    full_seq_len,
    ramp_shapes,
    run_length,
    warmup_steps,
)
from pipeline.config.vision import RowPictures, images_per_row


@dataclass(frozen=True)
class ForwardShape:
    """Derived numbers of a forward pass, of a run or of an evaluation; frozen."""

    sizes: ParallelSizes
    micro_batch_size: int
    seq_len: int
    vocab_size: int
    padded_vocab_size: int
    images_per_row: int
    """Pictures that the encoder reads with each row, blank ones included; 0: there is none."""

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.sizes.world_size


@dataclass(frozen=True)
class RunShape(ForwardShape):
    """Derived numbers of a run; frozen."""

    zero_stage: int
    """The ZeRO stage that runs: parallel.zero_stage, or 0 on one fp32 copy of the model."""
    global_batch_size: int
    total_steps: int
    total_tokens: int
    warmup_steps: int
    ramp: Ramp
    """(until_step, shape) in order; the last one has no end (until_step = total_steps)."""

    def at(self, step: int) -> StepShape:
        """The shape of optimizer step `step` (0 is the first)."""
        return next((shape for until, shape in self.ramp if step < until), self.ramp[-1][1])


def derive(
    cfg: PretrainConfig,
    *,
    world_size: int,
    tokenizer_vocab_size: int,
    row_tokens: int | None = None,
    pictures: RowPictures | None = None,
) -> RunShape:
    """The run's derived numbers.

    Args:
        cfg: the composed config.
        world_size: number of ranks (devices).
        tokenizer_vocab_size: of the training datasets' tokenizer.
        row_tokens: of packed training data; None: they are text.
        pictures: of the training data; None: they are not known.

    Raises:
        ConfigError: settings contradict each other; every broken rule is named, with its values
            and a legal one, on a line of its own.
    """
    vocabulary = tokenizer_vocab_size
    rules.check(
        cfg,
        world_size=world_size,
        tokenizer_vocab_size=vocabulary,
        row_tokens=row_tokens,
        pictures=pictures,
    )
    sizes = ParallelSizes.filling(cfg.parallel, world_size=world_size)
    ramp = ramp_shapes(cfg, sizes)
    total_steps, total_tokens = run_length(cfg.training, ramp)
    vocab_size = _vocab_size(cfg.model, vocabulary)
    return RunShape(
        sizes=sizes,
        zero_stage=_zero_stage(cfg, sizes),
        micro_batch_size=cfg.training.micro_batch_size,
        global_batch_size=cfg.training.global_batch_size,
        seq_len=full_seq_len(cfg),
        vocab_size=vocab_size,
        padded_vocab_size=pad_vocabulary(vocab_size, tensor_parallel_size=sizes.tensor),
        total_steps=total_steps,
        total_tokens=total_tokens,
        images_per_row=images_per_row(cfg.model, full_seq_len(cfg), pictures),
        warmup_steps=warmup_steps(cfg, total_steps),
        ramp=ramp,
    )


def derive_evaluation(
    evaluation: Evaluation,
    *,
    world_size: int,
    tokenizer_vocab_size: int,
    row_tokens: int | None = None,
    pictures: RowPictures | None = None,
) -> ForwardShape:
    """An evaluation's derived numbers; arguments and errors as above."""
    rules.raise_all(
        rules.evaluation_problems(
            evaluation,
            world_size=world_size,
            tokenizer_vocab_size=tokenizer_vocab_size,
            row_tokens=row_tokens,
            pictures=pictures,
        )
    )
    sizes = ParallelSizes.filling(evaluation.parallel, world_size=world_size)
    vocab_size = _vocab_size(evaluation.model, tokenizer_vocab_size)
    return ForwardShape(
        sizes=sizes,
        micro_batch_size=evaluation.micro_batch_size,
        seq_len=evaluation.seq_len,
        vocab_size=vocab_size,
        padded_vocab_size=pad_vocabulary(vocab_size, tensor_parallel_size=sizes.tensor),
        images_per_row=images_per_row(evaluation.model, evaluation.seq_len, pictures),
    )


def _vocab_size(model: ModelConfig, tokenizer_vocab_size: int) -> int:
    return tokenizer_vocab_size if model.vocab_size is None else model.vocab_size


def _zero_stage(cfg: PretrainConfig, sizes: ParallelSizes) -> int:
    """The ZeRO stage that runs: 0 where one rank holds all of an fp32 model.

    It computes the same without copying gradients and weights through flat buffers.
    """
    is_alone = sizes.replicas == sizes.pipeline == 1 and not cfg.parallel.offload_optimizer
    is_fp32 = cfg.training.precision is Precision.fp32
    return 0 if is_alone and is_fp32 else cfg.parallel.zero_stage
