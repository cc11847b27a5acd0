"""What a run tells the world: metrics.jsonl, a line a logged step, a progress bar, trackers.

    trainer --record, record_eval, event--> Metrics (rank 0) --> metrics.jsonl, for history.py
            --record_samples-->                              --> samples.jsonl
                                                             --> console, progress bar
                                                             --> Trackers: W&B, TensorBoard

Scalars stay on the device until a logged step reads them, so only logged steps wait for it.
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import orjson
import torch
from torch import Tensor

from pipeline.config.operation import TrackingConfig
from pipeline.config.run_shape import RunShape
from pipeline.log import logger
from pipeline.planning.flops import mfu, peak_tflops
from pipeline.planning.plan import Plan
from pipeline.redaction import redact
from pipeline.resilience.bookkeeping import bookkeeping, num_failures
from pipeline.resilience.goodput import Goodput
from pipeline.tracking.console import Console
from pipeline.tracking.environment import environment
from pipeline.tracking.history import rows_until
from pipeline.tracking.planned import COMPARED_AFTER_STEPS, Planned
from pipeline.tracking.row_file import RowFile
from pipeline.tracking.samples import SAMPLES, Sample
from pipeline.tracking.tracker import At
from pipeline.tracking.trackers import Trackers, trackers_of

if TYPE_CHECKING:
    from pipeline.engine.engine import StepResult
    from pipeline.evaluation.perplexity import EvalResult


class State(Protocol):
    """What is read of the trainer's state."""

    step: int
    tokens_seen: int
    skipped_steps: int
    restarts: int


class Metrics:
    """Keeps, prints and sends the numbers of a run; the main rank has one."""

    def __init__(
        self,
        cfg: TrackingConfig,
        *,
        run_dir: Path,
        config: dict[str, Any],
        shape: RunShape,
        flops_per_token: float,
        goodput: Goodput,
        facts: dict[str, Any],
        plan: Plan | None = None,
    ):
        """Open metrics.jsonl; the trackers are opened by `begin`.

        Args:
            cfg: the tracking section.
            run_dir: runs/<name>; its last part names the run in the trackers.
            config: the whole resolved config, for the trackers.
            shape: derived numbers.
            flops_per_token: from flops.flops_per_token.
            goodput: the account of the run's time; written on logged steps.
            facts: recorded at the start beside `environment()`: dataset identities, number of
                parameters.
            plan: of this run on this device; compared once with what is measured. None: nobody
                planned for this device.
        """
        self.cfg, self.shape, self.flops_per_token = cfg, shape, flops_per_token
        self.goodput = goodput
        self.plan, self._num_steps = plan, 0
        self._logged_steps = self._interval_steps = self._interval_tokens = 0
        self._interval_s = self._interval_wait_ms = 0.0
        self._losses: list[tuple[int, Tensor]] = []  # of the steps since the last logged one
        self.restart_clock()
        device = (
            torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else platform.processor() or "cpu"
        )
        self.peak_tflops = cfg.peak_tflops or peak_tflops(device)
        facts = redact({"device": device, **environment(), **facts})
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        commit, _, dirty = (facts["git_commit"] or "unknown").partition("-")
        logger.info(f"commit {commit[:12]}{dirty and ' (changed)'} on {device}; {versions}")
        self._rows = RowFile(run_dir / "metrics.jsonl")
        self._samples = RowFile(run_dir / SAMPLES)  # made when there is one
        self._write(
            {"event": "start", "time": time.time(), "world_size": shape.world_size, "facts": facts}
        )
        self._trackers = Trackers(
            trackers_of(cfg, run_dir=run_dir, config={**config, "facts": facts})
        )
        self._console = Console(
            total_steps=shape.total_steps, total_tokens=shape.total_tokens, progress=cfg.progress
        )

    def begin(self, state: State) -> None:
        """Training goes on from `state`; nothing is recorded before."""
        self.goodput.begin(state.step)
        past = rows_until(self._rows.path, state.step) if self._trackers.feeds else []
        self._trackers.begin(_at(state), past)

    def restart_clock(self) -> None:
        """Leave the time since the last record out of the throughput: it went to no step."""
        self._mark = time.perf_counter()

    def undo(self, state: State) -> None:
        """The run is back at `state`: no mean counts the steps behind it, nor their way back."""
        self._losses = [(step, loss) for step, loss in self._losses if step <= state.step]
        self._trackers.rewind(_at(state))
        self.restart_clock()

    def record(
        self,
        state: State,
        result: StepResult,
        *,
        data_wait_ms: float = 0.0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Take in one optimizer step; on logged steps read its scalars and pass them on.

        Args:
            state: after the step.
            result: of the step.
            data_wait_ms: time the step waited for its batch.
            extra: more values of the step, by metric name; 0-dim tensors are read on logged steps
                only.
        """
        self._interval_steps += 1
        self._num_steps += 1
        self._interval_tokens += self.shape.at(state.step - 1).tokens
        self._interval_wait_ms += data_wait_ms
        # A copy: the engine may sum the next step's in the same place. Nothing waits for it.
        self._losses.append((state.step, torch.as_tensor(result.loss).detach().clone()))
        # The first step of a process shows at once whether it works; the last one is what a run has
        # reached.
        is_due = state.step % self.cfg.log_every == 0 or state.step == self.shape.total_steps
        is_compared = self._num_steps == COMPARED_AFTER_STEPS and self.plan is not None
        if is_due or is_compared or not self._logged_steps:
            values = self._values(state, result, extra or {})
            if is_compared and self.plan is not None:
                with bookkeeping("the plan beside what is measured", errors=Exception):
                    planned = Planned.of(self.plan, step=state.step - 1)
                    logger.info(planned.beside(values))
                    values |= planned.values()
            self._send(state, values)
            self._console.show_step(state, values)
            self._logged_steps += 1
        now = time.perf_counter()
        self._interval_s, self._mark = self._interval_s + now - self._mark, now
        with bookkeeping("the progress bar"):  # the terminal may be gone
            self._console.advance(state)

    def record_eval(self, state: State, results: Mapping[str, EvalResult]) -> None:
        """Pass on what the model makes of each validation dataset."""
        for name, result in results.items():
            values = {
                "loss": result.loss,
                "ppl": result.ppl,
                "bits_per_byte": result.bits_per_byte,
                **({} if result.exact is None else {"exact": result.exact}),
            }
            sent = {**values, "tokens": result.tokens}
            self._send(state, {f"val/{name}/{key}": float(value) for key, value in sent.items()})
            self._console.show_evaluation(state, name, values)
        self._trackers.evaluated(_at(state))
        self.restart_clock()

    def record_samples(self, state: State, samples: Sequence[Sample]) -> None:
        """Keep what the model writes at this step in samples.jsonl, and pass it on."""
        at = _at(state)
        for number, sample in enumerate(samples):
            row = {"step": at.step, "tokens": at.tokens, "number": number, **sample._asdict()}
            self._samples.append(orjson.dumps(row) + b"\n")
        self._trackers.log_samples(at, samples)
        self._console.show_samples(state, samples)
        self.restart_clock()

    def event(self, state: State, values: Mapping[str, Any]) -> None:
        """Pass on values of no logged step, e.g. {"resilience/checkpoint_stall_ms": 12.0}."""
        self._send(state, dict(values))
        self.restart_clock()

    def finish(self, state: State) -> None:
        """The run has done its last step."""
        self._trackers.finish(_at(state))

    def close(self, exit_code: int = 0) -> None:
        """Finish the bar, the files and the trackers; waits for these a bounded time."""
        with bookkeeping("the progress bar"):
            self._console.close()
        self._rows.close()
        self._samples.close()
        self._trackers.close(exit_code)

    def _values(self, state: State, result: StepResult, extra: Mapping[str, Any]) -> dict[str, Any]:
        """The step's numbers; .item() waits for the device, so the clock is read after it."""
        loss, grad_norm = float(result.loss), float(result.grad_norm)
        losses = torch.stack([of_step for _, of_step in self._losses])
        mean_loss = float(losses[losses.isfinite()].mean())  # NaN where none is finite
        self._losses.clear()
        now = time.perf_counter()
        seconds = self._interval_s + now - self._mark
        tokens_per_sec = self._interval_tokens / seconds
        per_device = tokens_per_sec / self.shape.world_size
        values = {
            "train/loss": loss,
            "train/mean_loss": mean_loss,
            "train/lr": result.lr,
            "train/grad_norm": grad_norm,
            "train/tokens": state.tokens_seen,
            "throughput/tokens_per_sec": tokens_per_sec,
            "throughput/tokens_per_sec_per_device": per_device,
            "throughput/mfu": mfu(
                tokens_per_sec_per_device=per_device,
                flops_per_token=self.flops_per_token,
                peak_tflops=self.peak_tflops,
            ),
            "throughput/step_ms": 1e3 * seconds / self._interval_steps,
            "throughput/data_wait_ms": self._interval_wait_ms / self._interval_steps,
            "memory/peak_gib": _peak_memory_gib(),
            "resilience/restarts": state.restarts,
            "resilience/skipped_steps": state.skipped_steps,
            **{key: _number(value) for key, value in extra.items()},
            **self.goodput.write(state.step),
            "resilience/bookkeeping_failures": num_failures(),
        }
        self._interval_steps = self._interval_tokens = 0
        self._interval_s = self._interval_wait_ms = 0.0
        self._mark = now
        return values

    def _send(self, state: State, values: dict[str, Any]) -> None:
        at = _at(state)
        self._write({"step": at.step, "tokens": at.tokens, **values, "time": at.time})
        self._trackers.log(at, values)

    def _write(self, row: dict[str, Any]) -> None:
        self._rows.append(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")


class SilentMetrics(Metrics):
    """What the other ranks have: the same calls, nothing happens, scalars stay on the device."""

    def __init__(self) -> None:
        """Opens nothing."""

    def _nothing(self, *_: Any, **__: Any) -> None:
        """Instead of every public method."""

    begin = restart_clock = undo = record = record_eval = record_samples = _nothing
    event = finish = close = _nothing


def _at(state: State) -> At:
    return At(state.step, state.tokens_seen, time.time())


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _peak_memory_gib() -> float:
    """Most device memory this process held; without a device, most host memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
