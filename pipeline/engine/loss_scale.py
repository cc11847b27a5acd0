"""The loss scale of fp16, found and kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL_SCALE_POWER = 16  # log2 of the loss scale at the first step
GROWTH_INTERVAL = 1000  # steps without an overflow after which the loss scale doubles


class LossScale:
    """fp16's loss scale: halved at an overflow, doubled after GROWTH_INTERVAL steps without one.

    It is at least 1.

    Takes the place of DeepSpeed's scaler, which asks the host at every step whether the gradients
    overflowed. Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.
    """

    dynamic = True

    def __init__(self, device: torch.device) -> None:
        self.cur_scale = torch.full((), 2.0**INITIAL_SCALE_POWER, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, overflowed: Tensor) -> None:
        """Take in whether the step's gradients overflowed."""
        torch._amp_update_scale_(
            self.cur_scale, self._good_steps, overflowed.float(), 2.0, 0.5, GROWTH_INTERVAL
        )
        self.cur_scale.clamp_(min=1.0)

    def state(self) -> dict[str, float]:
        """JSON-able state for the checkpoint; waits for the device."""
        return {"scale": float(self.cur_scale), "good_steps": int(self._good_steps)}

    def restore(self, state: dict[str, float]) -> None:
        """Take up a checkpoint's state."""
        self.cur_scale.fill_(state["scale"])
        self._good_steps.fill_(int(state["good_steps"]))

    # ---- what DeepSpeed calls --------------------------------------------------------------------

    @property
    def loss_scale(self) -> Tensor:
        """The factor of the loss."""
        return self.cur_scale

    def scale_loss(self, loss: Tensor) -> Tensor:
        """`loss` times the scale."""
        return loss * self.cur_scale

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Gradients of the scaled loss."""
        self.scale_loss(loss).backward(retain_graph=retain_graph)

    def update_scale(self, overflow: bool) -> None:
        """DeepSpeed knows of no overflow: `update` has the last word."""
