"""The plan beside what a run measures.

Plan, a step --Planned.of--> plan/step_ms, plan/mfu, ... --beside(measured)--> one line of the log
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.planning.memory import GIB
from pipeline.planning.plan import Plan

# Optimizer steps of a process until its speed counts: the first compile, allocate and connect.
COMPARED_AFTER_STEPS = 10


@dataclass(frozen=True)
class Planned:
    """What the plan says of the main rank, in the units of the metrics."""

    step_ms: float
    tokens_per_sec: float
    mfu: float
    peak_gib: float
    """Tensors at their peak, as torch counts them."""

    @classmethod
    def of(cls, plan: Plan, *, step: int) -> Planned:
        """Of optimizer step `step` (0 is the first); the main rank is in the first stage.

        A plan is of a step once every ramp has ended; what is measured is often within one.
        """
        now = plan.at(plan.job.shape.at(step))
        return cls(
            step_ms=1e3 * now.time.total,
            tokens_per_sec=now.tokens_per_s,
            # As it is measured: of operations on a token of a full-length sequence.
            mfu=plan.mfu * now.tokens_per_s / plan.tokens_per_s,
            peak_gib=now.memory[0].tensors / GIB,
        )

    def values(self) -> dict[str, float]:
        """By metric name."""
        return {f"plan/{name}": value for name, value in asdict(self).items()}

    def beside(self, measured: Mapping[str, Any]) -> str:
        """Planned and measured, on one line.

        Args:
            measured: the values of a logged step, by metric name.
        """
        pairs = [
            ("step_ms", self.step_ms, measured["throughput/step_ms"], ".1f"),
            ("tokens/s", self.tokens_per_sec, measured["throughput/tokens_per_sec"], ",.0f"),
            ("mfu", self.mfu, measured["throughput/mfu"], ".1%"),
            ("peak_gib", self.peak_gib, measured["memory/peak_gib"], ".2f"),
        ]
        texts = [
            f"{name} {planned:{form}} planned, {found:{form}} measured"
            for name, planned, found, form in pairs
            if found is not None
        ]
        return "plan: " + " | ".join(texts)
