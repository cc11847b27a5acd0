"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from pipeline.config.choices import Decay
from pipeline.config.training import ScheduleConfig


def lr_at(
    step: int, *, lr: float, schedule: ScheduleConfig, warmup_steps: int, total_steps: int
) -> float:
    """Learning rate of optimizer step `step` (0 is the first).

    Warm-up is linear and ends at `lr`; then cosine (Loshchilov & Hutter 2017, arXiv:1608.03983),
    linear, or wsd: constant and a linear descent over the last decay_steps (Hu et al. 2024,
    arXiv:2404.06395), each ending at min_lr.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    low, high = schedule.min_lr, lr
    if schedule.decay is Decay.constant:
        return high
    if schedule.decay is Decay.wsd:
        length = schedule.decay_steps or max(1, total_steps // 5)
        start = total_steps - length
    else:
        start = warmup_steps
        length = schedule.decay_steps or max(1, total_steps - start)
    progress = min(1.0, max(0.0, (step - start) / length))
    if schedule.decay is Decay.cosine:
        return low + (high - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return high - (high - low) * progress
