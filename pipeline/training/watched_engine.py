"""The engine of a run: traced when the user asks, impatient once it has made a step."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

from pipeline.distributed.timeouts import shorten_timeouts
from pipeline.engine.engine import Engine, StepResult
from pipeline.training.profile import StepProfile

if TYPE_CHECKING:
    from pipeline.data.batch import Batch


class WatchedEngine(Engine):
    """An Engine that traces chosen steps, and after its first one waits less for other ranks."""

    def __init__(
        self, *args: Any, profile: StepProfile | None, timeout_s: float, **kwargs: Any
    ) -> None:
        """As Engine.

        Args:
            profile: of the steps that are traced; None: none are.
            timeout_s: what a collective between devices may take once a step is done.
        """
        super().__init__(*args, **kwargs)
        self._profile, self._timeout_s = profile, timeout_s
        self._has_stepped = False

    def train_step(
        self, batches: list[Batch], *, step: int, max_loss: float = math.inf
    ) -> StepResult:
        """As Engine.train_step."""
        with self._profile.around(step) if self._profile else contextlib.nullcontext():
            result = super().train_step(batches, step=step, max_loss=max_loss)
        if not self._has_stepped:
            self._has_stepped = True
            shorten_timeouts(self._timeout_s, but=self.layout.host_group)
        return result
