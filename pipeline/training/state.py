"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pipeline.config.step_shape import StepShape
from pipeline.errors import CheckpointError


def is_due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps, 0: never, happens after this one."""
    return every > 0 and step % every == 0


@dataclass
class TrainState:
    """How far the run is; lives in every checkpoint."""

    step: int = 0
    tokens_seen: int = 0
    samples_seen: int = 0
    skipped_steps: int = 0
    restarts: int = 0

    @classmethod
    def of(cls, saved: dict[str, int]) -> TrainState:
        """The state in a checkpoint's record; what newer programs add is let be.

        Raises:
            CheckpointError: it lacks a number.
        """
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in saved]:
            raise CheckpointError(f"the checkpoint's record lacks state.{missing[0]}.")
        return cls(*(saved[name] for name in names))

    def advance(self, shape: StepShape) -> None:
        """One optimizer step is done, applied or skipped."""
        self.step += 1
        self.tokens_seen += shape.tokens
        self.samples_seen += shape.num_samples
