"""What a run looks at every so many steps, beside its evaluations: attention heads, its own text.

A look is collective, leaves training as it was to the last bit, and is no part of a step. A new one
is a line in build.py's `build_looks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pipeline.training.state import TrainState, is_due

if TYPE_CHECKING:
    from pipeline.resilience.clock import Clock

Look = Callable[[TrainState], None]


class Looks:
    """Those that a run takes, in their order."""

    def __init__(self, looks: Sequence[tuple[int, Look]], *, clock: Clock) -> None:
        """Nothing is looked at yet.

        Args:
            looks: steps between two, 0: never; and what is done with the run's state.
            clock: hears when one begins.
        """
        self._looks, self._clock = looks, clock

    def after(self, state: TrainState) -> None:
        """Take the looks that are due after this step. Collective: call on every rank."""
        for every, look in self._looks:
            if is_due(every, state.step):
                self._clock.enter("evaluation", state.step)
                look(state)
