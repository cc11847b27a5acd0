"""Bad numbers and loss spikes: what every rank decides alike after each step.

    StepResult --step_agreement--> StepSummary --Guard.judge--> Action, perhaps a ledger entry

`Guard` is pure: the same summaries give the same actions on every rank and on every replay. Its
state (history, ledger) lives in the checkpoint: a resumed run judges as the undisturbed one does.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

from pipeline.config.choices import OnSpike
from pipeline.config.operation import ResilienceConfig
from pipeline.resilience.step_agreement import StepSummary

# continue: nothing to do; rollback: load the newest checkpoint of a step <= the entry's and jump
# over the samples read since; stop: give up with a report.
Action = Enum("Action", ["continue_", "rollback", "stop"])
# A spike that comes back after this many rollbacks to one checkpoint is not the data's fault.
MAX_ROLLBACKS = 3
# Median absolute deviation times this estimates the standard deviation of a normal distribution.
MAD_TO_SIGMA = 1.4826
# Gradients that overflow after so many halvings of the loss scale in a row do not overflow because
# of it.
LOSS_SCALE_HALVINGS = 20
# Losses that hardly move have a deviation near 0; below this share of the median nothing is a
# spike.
MIN_SIGMA = 0.002


@dataclass(frozen=True)
class Event:
    """A line of the ledger."""

    step: int
    kind: str
    """bad_numbers or spike."""
    action: str
    """skip, rollback or stop."""
    loss: float | None
    """None when it was not finite: JSON has no NaN."""
    limit: float | None
    """Loss above which the step was a spike."""


class Guard:
    """Judge of every step; history of good losses; ledger of what was done.

    A spike is a loss above median + spike_sigmas robust standard deviations of the last
    spike_window good losses; nothing is one until half the window is filled.
    """

    def __init__(self, cfg: ResilienceConfig, *, loss_scaling: bool) -> None:
        """Start without history.

        Args:
            cfg: the resilience section.
            loss_scaling: fp16, where a gradient overflow is how the loss scale is found, not a bad
                number.
        """
        self.cfg = cfg
        self.overflows_allowed = LOSS_SCALE_HALVINGS if loss_scaling else 0
        self.overflows_in_a_row = 0
        self.history: deque[float] = deque(maxlen=cfg.spike_window)
        self.ledger: list[Event] = []
        self.bad_in_a_row = 0
        self.rollbacks = 0
        """Since the last `checkpoint_saved`."""

    @property
    def limit(self) -> float:
        """Loss above which the next step is a spike; inf under policy none or a short history."""
        if self.cfg.on_spike is OnSpike.none or len(self.history) < max(
            2, self.cfg.spike_window // 2
        ):
            return math.inf
        median = statistics.median(self.history)
        deviation = MAD_TO_SIGMA * statistics.median(abs(loss - median) for loss in self.history)
        return median + self.cfg.spike_sigmas * max(deviation, MIN_SIGMA * abs(median))

    @property
    def max_loss(self) -> float:
        """Loss above which the engine must not apply a step: `limit` under policy skip, or inf."""
        return self.limit if self.cfg.on_spike is OnSpike.skip else math.inf

    def judge(self, summary: StepSummary) -> Action:
        """What to do after a step; writes the ledger."""
        limit = self.limit
        overflowed = not math.isfinite(summary.grad_norm)
        self.overflows_in_a_row = self.overflows_in_a_row + 1 if overflowed else 0
        if not math.isfinite(summary.loss) or self.overflows_in_a_row > self.overflows_allowed:
            return self._bad(summary, "bad_numbers", None)
        if summary.loss > limit and self.cfg.on_spike is OnSpike.rollback:
            self.rollbacks += 1
            action = Action.rollback if self.rollbacks <= MAX_ROLLBACKS else Action.stop
            self._note(summary, "spike", action.name, limit)
            return action
        if summary.loss > limit:
            return self._bad(summary, "spike", limit)
        if overflowed:
            return Action.continue_
        self.bad_in_a_row = 0
        # Where nothing is a spike nobody asks for it, and a checkpoint need not tell: the losses of
        # a private run have no noise.
        if self.cfg.on_spike is not OnSpike.none:
            self.history.append(summary.loss)
        return Action.continue_

    def checkpoint_saved(self) -> None:
        """Rollbacks are counted per checkpoint: call after each save."""
        self.rollbacks = 0

    def _bad(self, summary: StepSummary, kind: str, limit: float | None) -> Action:
        self.bad_in_a_row += 1
        stop = self.bad_in_a_row >= self.cfg.max_bad_steps
        self._note(summary, kind, "stop" if stop else "skip", limit)
        return Action.stop if stop else Action.continue_

    def _note(self, summary: StepSummary, kind: str, action: str, limit: float | None) -> None:
        loss = summary.loss if math.isfinite(summary.loss) else None
        self.ledger.append(Event(summary.step, kind, action, loss, limit))

    def state(self) -> dict[str, Any]:
        """JSON-able state for the checkpoint."""
        return {
            "history": list(self.history),
            "ledger": [asdict(event) for event in self.ledger],
            "bad_in_a_row": self.bad_in_a_row,
            "overflows_in_a_row": self.overflows_in_a_row,
        }

    def restore(self, state: dict[str, Any], *, keep_ledger: bool = False) -> None:
        """Take up a checkpoint's state; keep_ledger: after a rollback, the record stays."""
        self.history = deque(state.get("history", ()), maxlen=self.cfg.spike_window)
        self.bad_in_a_row = state.get("bad_in_a_row", 0)
        self.overflows_in_a_row = state.get("overflows_in_a_row", 0)
        if not keep_ledger:
            self.ledger = [
                Event(**{f.name: event[f.name] for f in fields(Event)})
                for event in state.get("ledger", ())
            ]
            self.rollbacks = 0

    def report(self) -> str:
        """Why training ends, with the last entries of the ledger and the ways out."""
        lines = [
            f"  step {e.step}: {e.kind}, {e.action}, loss {e.loss}"
            + (f" above {e.limit:.4f}" if e.limit else "")
            for e in self.ledger[-max(self.cfg.max_bad_steps, MAX_ROLLBACKS + 1) :]
        ]
        last = self.ledger[-1]
        if self.rollbacks > MAX_ROLLBACKS:
            why = f"the loss spiked again after {MAX_ROLLBACKS} rollbacks to step {last.step}"
        else:
            why = f"{self.bad_in_a_row} steps in a row could not be applied"
            why += " (resilience.max_bad_steps)"
        ways_out = [
            "The newest checkpoint is from before the last of them.",
            "Lower optimizer.lr, raise schedule.warmup_steps, or set model.qk_norm=true or "
            "model.z_loss_coeff=1e-4.",
            "tracking.sample_hash=true tells which data it was.",
        ]
        return "\n".join([f"{why}.", *lines, *ways_out])
