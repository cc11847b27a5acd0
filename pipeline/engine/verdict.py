"""What the optimizer's kernel is told of a step: clip it, leave it out, undo the loss scale.

    gradient norm, loss --decide_update--> Verdict --> fused AdamW (its grad_scale, found_inf)
                                                   --> LossScale.update (fp16)

The host launches a step and goes on with the next; it learns what was decided when it reads the
numbers. Both decisions travel as tensors, by the protocol of torch.amp.GradScaler: the kernel
divides every gradient by grad_scale and, where found_inf is 1, changes neither weights nor moments
nor its step count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s


@dataclass(frozen=True)
class Verdict:
    """Decisions about one step; 0-dim tensors on the device."""

    grad_norm: Tensor
    """fp32, before clipping, without the loss scale; not finite where a gradient was not."""
    overflowed: Tensor
    """bool: a gradient was not finite."""
    left_out: Tensor
    """bool: the update must not be applied, for an overflow or a loss above the limit."""
    grad_scale: Tensor | None
    """fp32 divisor of every gradient: loss scale and clipping; None: there is neither."""


def decide_update(
    grad_norm: Tensor,
    *,
    clip_grad: float,
    loss: Tensor | None,
    max_loss: float,
    loss_scale: Tensor | None,
) -> Verdict:
    """Decide about a step.

    Args:
        grad_norm: 0-dim fp32, global norm before clipping, without the loss scale.
        clip_grad: largest norm that is applied; 0: no clipping.
        loss: 0-dim mean loss of the step, needed where max_loss is finite.
        max_loss: the step is left out when its loss is above, or not a number.
        loss_scale: 0-dim factor that the gradients still carry; None: 1.
    """
    overflowed = (grad_norm < math.inf).logical_not()  # true of NaN too
    left_out = (
        overflowed if loss is None or max_loss == math.inf else overflowed | ~(loss <= max_loss)
    )
    grad_scale = loss_scale
    if clip_grad:
        excess = ((grad_norm + CLIP_EPSILON) / clip_grad).clamp(min=1.0)
        grad_scale = excess if loss_scale is None else excess * loss_scale
    return Verdict(grad_norm, overflowed, left_out, grad_scale)
