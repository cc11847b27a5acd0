"""One tiny all-reduce a step, after which every rank knows the same about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StepSummary:
    """What all ranks know alike about one step."""

    step: int
    """Optimizer step the numbers belong to; 0 is the first."""
    loss: float
    """NaN when it was not finite on some rank."""
    grad_norm: float
    """NaN when it was not finite on some rank."""
    skipped: bool
    """The optimizer did not apply the step."""
    notice: bool
    """Some rank has been asked to save and leave."""


class StepAgreement:
    """One all-reduce a step that makes notice, loss and skip known to every rank alike.

    On CUDA the answer for step k is read when step k + 1 is launched: the host stays at most a step
    ahead, and the device always has a whole step before it. On the CPU the answer is read at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_late = device.type == "cuda"
        self._waiting: tuple[int, torch.Tensor, torch.cuda.Event | None] | None = None

    def agree(
        self,
        step: int,
        *,
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
        skipped: torch.Tensor,
        notice: bool,
    ) -> StepSummary | None:
        """The newest summary that all ranks know; late: of the call before, None at the first.

        Collective: call on every rank of the world, after each step.

        Args:
            step: optimizer step the numbers belong to.
            loss, grad_norm, skipped: 0-dim, on the device: the engine's StepResult.
            notice: whether this process has been asked to leave.
        """
        import torch
        import torch.distributed as dist

        row = [x.float().reshape(()) for x in (loss, grad_norm, skipped)]
        # NaN does not survive MAX on every backend: it travels as a flag.
        flags = [(~torch.isfinite(x)).float() for x in row[:2]]
        row = [torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in row]
        numbers = torch.stack([*row, *flags, torch.full_like(row[0], notice)])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        if not self.is_late:
            return _summary(step, numbers.tolist())
        before = self.drain()
        self._waiting = (step, *_to_host(numbers))
        return before

    def drain(self) -> StepSummary | None:
        """The summary that `agree` still keeps, where there is one; waits for its step."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return None
        step, numbers, copied = waiting
        if copied is not None:
            copied.synchronize()
        return _summary(step, numbers.tolist())


def _to_host(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """(copy on the host, the event after which it holds the numbers)."""
    import torch

    if numbers.device.type != "cuda":
        return numbers, None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


def _summary(step: int, numbers: list[float]) -> StepSummary:
    loss, grad_norm, skipped, bad_loss, bad_norm, notice = numbers
    loss, grad_norm = math.nan if bad_loss else loss, math.nan if bad_norm else grad_norm
    return StepSummary(step, loss, grad_norm, bool(skipped), bool(notice))
