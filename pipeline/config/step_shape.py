"""What a step consumes and how many there are: arithmetic on settings that `rules` has passed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config.parallel_sizes import ParallelSizes
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.training import RampStage, TrainingConfig

Ramp = tuple[tuple[int, "StepShape"], ...]
"""(until_step, shape) in order; the last one has no end."""
NO_END = 2**62
WARMUP_STEPS = 100
"""Of warm-up where none is set and the run is long enough."""


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


def full_seq_len(cfg: PretrainConfig) -> int:
    """Tokens per sequence once every ramp has ended."""
    return cfg.training.seq_len if cfg.training.seq_len is not None else cfg.model.max_seq_len


def stages(cfg: PretrainConfig) -> list[tuple[str, RampStage]]:
    """(the section it was set in, stage) of the ramp and of what follows it, nulls filled in."""
    training = cfg.training
    entries = [(f"training.ramp[{i}]", stage) for i, stage in enumerate(training.ramp)]
    filled = []
    for name, stage in [*entries, ("training", RampStage(until_step=NO_END))]:
        batch, length = stage.global_batch_size, stage.seq_len
        batch = training.global_batch_size if batch is None else batch
        length = full_seq_len(cfg) if length is None else length
        filled.append((name, RampStage(stage.until_step, batch, length)))
    return filled


def ramp_shapes(cfg: PretrainConfig, sizes: ParallelSizes) -> Ramp:
    """The shape of a step in every stage."""
    per_pass, shapes = cfg.training.micro_batch_size * sizes.data, []
    for _, stage in stages(cfg):
        batch, length = stage.global_batch_size, stage.seq_len
        assert batch is not None and length is not None
        pieces = full_seq_len(cfg) // length
        shape = StepShape(batch, length, batch // per_pass, batch // pieces)
        shapes.append((stage.until_step, shape))
    return tuple(shapes)


def run_length(training: TrainingConfig, ramp: Ramp) -> tuple[int, int]:
    """(total_steps, total_tokens) from whichever of the two is set; tokens fill whole steps."""
    num_steps, num_tokens, start = 0, 0, 0
    for until, shape in ramp:
        room = until - start
        if training.total_steps is not None:
            take = min(room, training.total_steps - num_steps)
        else:
            assert training.total_tokens is not None
            missing = max(0, math.ceil((training.total_tokens - num_tokens) / shape.tokens))
            take = min(room, missing)
        num_steps, num_tokens, start = num_steps + take, num_tokens + take * shape.tokens, until
    return num_steps, num_tokens


def warmup_steps(cfg: PretrainConfig, total_steps: int) -> int:
    """Optimizer steps of linear warm-up; tokens count steps of the full size.

    Where nothing is set it bends to the run: twenty steps to try something out must simply train.
    """
    steps, tokens = cfg.schedule.warmup_steps, cfg.schedule.warmup_tokens
    if tokens is not None:
        return math.ceil(tokens / (cfg.training.global_batch_size * full_seq_len(cfg)))
    return min(WARMUP_STEPS, total_steps // 10) if steps is None else steps
