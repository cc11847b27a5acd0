"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.step_shape import StepShape


@dataclass
class TrainState:
    """How far the run is; lives in every checkpoint."""

    step: int = 0
    tokens_seen: int = 0
    samples_seen: int = 0
    skipped_steps: int = 0
    restarts: int = 0

    def advance(self, shape: StepShape) -> None:
        """One optimizer step is done, applied or skipped."""
        self.step += 1
        self.tokens_seen += shape.tokens
        self.samples_seen += shape.num_samples
