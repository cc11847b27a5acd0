"""What somebody at the terminal sees of a run: a line a logged step, evaluations, a progress bar.

    step 1200/1800 | loss 3.4453 | norm 0.512 | 12.3k tok/s | eta 3m 12s

A line has at most log.COLUMNS columns: what there is no room for is left out and is in
metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pipeline import log
from pipeline.errors import visible
from pipeline.log import logger
from pipeline.tracking.samples import Sample

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {elapsed}"
"""Of tqdm's own, without its time to go: the lines have one, which counts tokens."""


class State(Protocol):
    """What is read of the trainer's state."""

    step: int
    tokens_seen: int


class Console:
    """The main rank's words while it trains."""

    def __init__(self, *, total_steps: int, total_tokens: int, progress: bool) -> None:
        """Args: progress: a bar where standard error is a terminal."""
        self.total_steps, self.total_tokens = total_steps, total_tokens
        self._wanted = progress and sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._cleanup = contextlib.ExitStack()

    def show_step(self, state: State, values: Mapping[str, Any]) -> None:
        """The line of a logged step.

        Args:
            values: its numbers, by metric name; the loss is the mean since the line before, as one
                step's scatters (by 0.6 nats with four sequences a step).
        """
        rate, utilisation = values["throughput/tokens_per_sec"], values["throughput/mfu"]
        to_go_s = max(0, self.total_tokens - state.tokens_seen) / rate
        parts = {
            "step": f"step {state.step}/{self.total_steps}",
            "loss": f"loss {values['train/mean_loss']:.4f}",
            "lr": f"lr {values['train/lr']:.1e}",
            "norm": f"norm {values['train/grad_norm']:.3g}",
            "rate": f"{short(rate)} tok/s",
            "mfu": "" if utilisation is None else f"mfu {utilisation:.0%}",
            "eta": f"eta {duration(to_go_s)}",
        }
        for left_out in ("", "lr", "norm", "mfu"):
            parts.pop(left_out, None)
            line = " | ".join(filter(None, parts.values()))
            if len(line) <= log.COLUMNS:
                break
        logger.info(line)

    def show_evaluation(self, state: State, name: str, scores: Mapping[str, float]) -> None:
        """What the model makes of a held-out dataset."""
        text = ", ".join(f"{key} {value:.4f}" for key, value in scores.items())
        logger.info(f"step {state.step}: held out {name}: {text}")

    def show_samples(self, state: State, samples: Sequence[Sample]) -> None:
        """The beginning of each sample, on a line."""
        for sample in samples:
            text = " ".join(visible(sample.prompt + sample.text).split())
            line = f"step {state.step}: writes: {text}"
            logger.info(line if len(line) <= log.COLUMNS else line[: log.COLUMNS - 3] + "...")

    def advance(self, state: State) -> None:
        """Move the progress bar, which exists only where somebody looks at the terminal."""
        if self._bar is None:
            self._bar = tqdm(
                total=self.total_steps,
                initial=state.step,
                disable=not self._wanted,
                unit="step",
                dynamic_ncols=True,
                bar_format=BAR,
            )
            self._cleanup.callback(self._bar.close)
            if self._wanted:  # log lines go above the bar
                self._cleanup.enter_context(logging_redirect_tqdm([logger]))
        else:
            self._bar.update(state.step - self._bar.n)

    def close(self) -> None:
        """Finish the bar."""
        self._cleanup.close()


def short(number: float) -> str:
    """Three figures of a count: 950, 12.3k, 4.56M."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:  # what would round to 1000 of the next smaller one
            return f"{number / factor:.3g}{letter}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """The two largest units: 45s, 3m 12s, 4h 05m, 12d 03h."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    day, hour = divmod(hours, 24)
    if day:
        return f"{day}d {hour:02}h"
    if hour:
        return f"{hour}h {minute:02}m"
    return f"{minute}m {second:02}s" if minute else f"{second}s"
