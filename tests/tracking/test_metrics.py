"""metrics.jsonl, the console line, and a W&B that may fail in every way without stopping a run."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from pipeline.config.choices import WandbMode
from pipeline.config.operation import TrackingConfig
from pipeline.config.parallel_sizes import ParallelSizes
from pipeline.config.run_shape import RunShape
from pipeline.config.step_shape import StepShape
from pipeline.log import logger
from pipeline.resilience.bookkeeping import num_failures
from pipeline.resilience.clock import Clock
from pipeline.resilience.goodput import Goodput
from pipeline.tracking import feed, metrics
from pipeline.tracking.metrics import Metrics, SilentMetrics
from pipeline.tracking.planned import Planned
from pipeline.tracking.samples import Sample, read_samples
from tests.support.waiting import HANG_S, wait_until


@dataclasses.dataclass
class State:
    step: int = 0
    tokens_seen: int = 0
    skipped_steps: int = 0
    restarts: int = 0


RUN = RunShape(
    sizes=ParallelSizes(tensor=2), zero_stage=0, micro_batch_size=1, global_batch_size=4, seq_len=8, vocab_size=256,
    padded_vocab_size=256, images_per_row=0, total_steps=20, total_tokens=640, warmup_steps=0, ramp=((20, StepShape(4, 8, 4, 4)),),
)  # fmt: skip


def make(run_dir: Path, *, state: State | None = None, **tracking: object) -> Metrics:
    cfg = TrackingConfig(**{"wandb": WandbMode.disabled, "log_every": 5, **tracking})
    made = Metrics(
        cfg, run_dir=run_dir, config={"seed": 1}, shape=RUN, flops_per_token=1e6, goodput=Goodput(run_dir, Clock()),
        facts={"dataset": "abc"},
    )  # fmt: skip
    made.begin(state or State())
    return made


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """In place of the one by which throughput is measured: goes on when it is told to."""
    made = SimpleNamespace(**vars(time), now=0.0)
    made.perf_counter = lambda: made.now
    monkeypatch.setattr(metrics, "time", made)
    return made


def train(tracker: Metrics, state: State, num_steps: int, clock: Any = None) -> None:
    """A step takes a quarter of a second of the clock."""
    for _ in range(num_steps):
        if clock:
            clock.now += 0.25
        state.step += 1
        state.tokens_seen += 32
        result = SimpleNamespace(
            loss=torch.tensor(1 / state.step), grad_norm=torch.tensor(2.0), lr=1e-3
        )
        tracker.record(state, result, data_wait_ms=2.0)


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_logged_steps_are_the_first_the_multiples_and_the_last(tmp_path):
    """Other steps must not read scalars: reading waits for the device."""
    tracker = make(tmp_path, log_every=6)
    train(tracker, State(), 20)
    tracker.close()
    assert [row["step"] for row in rows(tmp_path)[1:]] == [1, 6, 12, 18, 20]


def test_planned_stands_beside_measured_once_after_ten_steps(tmp_path, caplog, monkeypatch):
    """Whether the plan was right is known minutes into a run, and kept in its metrics."""
    tracker = make(tmp_path, log_every=8)
    tracker.plan, steps = object(), []
    planned = Planned(step_ms=1.0, tokens_per_sec=100.0, mfu=0.4, peak_gib=2.0)
    monkeypatch.setattr(Planned, "of", lambda _, *, step: steps.append(step) or planned)
    with caplog.at_level(logging.INFO, logger=logger.name):
        train(tracker, State(step=3), 17)
    tracker.close()
    found = {row["step"]: row for row in rows(tmp_path)[1:]}
    assert list(found) == [4, 8, 13, 16, 20]
    assert found[13]["plan/step_ms"] == 1.0 and found[13]["throughput/step_ms"] > 0
    assert not [key for step in (4, 8, 16, 20) for key in found[step] if key.startswith("plan/")]
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("plan: ")]
    assert len(said) == 1 and "step_ms 1.0 planned, " in said[0]
    assert steps == [12]  # the one that is measured: the thirteenth of the run


def test_a_plan_that_fails_ends_no_run(tmp_path):
    """It is only told of the run."""
    tracker = make(tmp_path, log_every=8)
    tracker.plan = object()
    train(tracker, State(), 12)
    tracker.close()
    assert [row["step"] for row in rows(tmp_path)[1:]] == [1, 8, 10]


def test_a_logged_step_carries_the_documented_names(tmp_path):
    """Report, dashboards and alerts find values by these names."""
    tracker = make(tmp_path, peak_tflops=1.0)
    train(tracker, State(restarts=3), 5)
    tracker.close()
    start, _, last = rows(tmp_path)
    assert start["event"] == "start"
    assert start["facts"]["dataset"] == "abc"
    assert {"git_commit", "versions", "host", "device"} <= set(start["facts"])
    assert last["train/loss"] == pytest.approx(0.2)
    assert last["train/mean_loss"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4)
    assert last["train/tokens"] == last["tokens"] == 160
    assert last["throughput/data_wait_ms"] == 2.0
    assert last["resilience/restarts"] == 3
    per_device = last["throughput/tokens_per_sec_per_device"]
    assert per_device == pytest.approx(last["throughput/tokens_per_sec"] / 2)
    assert last["throughput/mfu"] == pytest.approx(per_device * 1e6 / 1e12)
    assert last["memory/peak_gib"] > 0


def test_steps_that_a_rollback_undid_are_in_no_mean(tmp_path, clock):
    """Nor is the time that it takes to read a checkpoint in the throughput."""
    tracker, state = make(tmp_path), State()
    train(tracker, state, 8, clock)
    state.step, state.tokens_seen = 6, 192  # logged at 5; 7 and 8 were bad
    clock.now += 100
    tracker.undo(state)
    train(tracker, state, 4, clock)
    tracker.close()
    last = rows(tmp_path)[-1]
    assert (last["step"], last["throughput/step_ms"]) == (10, 250)
    assert last["train/mean_loss"] == pytest.approx(sum(1 / step for step in range(6, 11)) / 5)


def test_throughput_is_tokens_over_the_time_of_steps_alone(tmp_path, clock):
    """An evaluation or checkpoint between steps is not training time."""
    tracker, state = make(tmp_path), State()
    train(tracker, state, 3, clock)
    clock.now += 100
    tracker.restart_clock()
    train(tracker, state, 2, clock)
    tracker.close()
    last = rows(tmp_path)[-1]
    assert (last["throughput/step_ms"], last["throughput/tokens_per_sec"]) == (250, 4 * 32)


def test_unknown_peak_gives_no_mfu(tmp_path):
    """A number made up for a device we do not know would be worse than none."""
    tracker = make(tmp_path)
    tracker.peak_tflops = None
    train(tracker, State(), 1)
    tracker.close()
    assert rows(tmp_path)[-1]["throughput/mfu"] is None


def test_nan_loss_is_written_as_valid_json(tmp_path):
    """json has no NaN; a reader must not fail on the step that matters most."""
    tracker, state = make(tmp_path), State(step=1, tokens_seen=32)
    tracker.record(
        state, SimpleNamespace(loss=torch.tensor(float("nan")), grad_norm=float("inf"), lr=0.0)
    )
    tracker.close()
    assert rows(tmp_path)[-1]["train/loss"] is None


def test_evaluations_events_and_extra_values_are_recorded(tmp_path):
    """Everything that is shown is in metrics.jsonl too."""
    tracker, state = make(tmp_path), State(step=7, tokens_seen=224)
    scores = {"loss": 2.0, "ppl": 7.4, "bits_per_byte": 0.9, "tokens": 10}
    tracker.record_eval(
        state,
        {
            "wiki": SimpleNamespace(**scores, exact=None),
            "talks": SimpleNamespace(**scores, exact=40.0),
        },
    )
    tracker.event(state, {"resilience/checkpoint_stall_ms": 12.5})
    result = SimpleNamespace(loss=torch.tensor(1.0), grad_norm=1.0, lr=0.0)
    tracker.record(state, result, extra={"moe/aux_loss": torch.tensor(0.5)})
    tracker.close()
    evaluation, talks, event, step = rows(tmp_path)[1:]
    assert talks["val/talks/exact"] == 40.0 and "val/wiki/exact" not in evaluation
    assert [evaluation[f"val/wiki/{key}"] for key in scores] == [2, 7.4, 0.9, 10]
    assert event["resilience/checkpoint_stall_ms"] == 12.5
    assert step["moe/aux_loss"] == 0.5


def test_a_restart_appends_after_a_half_written_line(tmp_path):
    """kill -9 may cut a line; the next one must not be glued to it."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    tracker = make(tmp_path)
    tracker.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[1] == '{"ste'
    assert json.loads(lines[2])["event"] == "start"


def test_only_the_main_rank_writes(tmp_path):
    """Thousands of ranks share the run folder; what the main rank's can, theirs can, and is silent."""
    public = {name for name, value in vars(Metrics).items() if name[0] != "_" and callable(value)}
    assert public == {name for name in vars(SilentMetrics) if name[0] != "_"}
    tracker = SilentMetrics()
    tracker.begin(State())
    train(tracker, State(), 5)
    tracker.event(State(), {"resilience/failed_saves": 1})
    tracker.restart_clock()
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_samples_are_kept_beside_the_metrics_and_in_wandb(tmp_path):
    """W&B has them as a table a step, which it puts together over the steps."""
    failures = num_failures()
    tracker = make(tmp_path, wandb=WandbMode.offline)
    tracker.record_samples(State(step=5, tokens_seen=160), [Sample("a", " b\n"), Sample("", "é")])
    tracker.close()
    assert read_samples(tmp_path) == {5: [Sample("a", " b\n"), Sample("", "é")]}
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["step", "tokens", "prompt", "text"]
    assert content["data"] == [[5, 160, "a", " b\n"], [5, 160, "", "é"]]
    assert num_failures() == failures


def test_wandb_offline_keeps_one_id_over_restarts(tmp_path):
    """A requeued job goes on in the same W&B run."""
    failures = num_failures()
    for restart in range(2):
        tracker = make(tmp_path, wandb=WandbMode.offline)
        train(tracker, State(restarts=restart), 5)
        tracker.close()
        assert num_failures() == failures
    identity = (tmp_path / "wandb-id").read_text()
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert files
    assert {file.name for file in files} == {f"run-{identity}.wandb"}


def test_wandb_that_raises_does_not_stop_training(tmp_path, monkeypatch):
    """A W&B failure is counted, and tried again until the end."""
    import wandb

    def refuse(**_: object) -> None:
        tries.append(1)
        raise RuntimeError("no route to host")

    tries: list[int] = []
    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setattr(feed, "PAUSE_S", 0.01)
    failures = num_failures()
    tracker = make(tmp_path, wandb=WandbMode.online)
    wait_until(lambda: len(tries) > 2)
    train(tracker, State(), 20)
    tracker.close()
    assert num_failures() > failures + 2
    assert rows(tmp_path)[-1]["step"] == 20


def test_wandb_whose_process_dies_is_opened_again_and_gets_what_it_missed(tmp_path, monkeypatch):
    """wandb-core is a process of its own: killed by hand, by Slurm's TERM, or for its memory."""
    monkeypatch.setattr(feed, "PAUSE_S", 0.01)
    tracker, state = make(tmp_path, wandb=WandbMode.offline), State()
    train(tracker, state, 5)
    wait_until(lambda: tracker._trackers.feeds[0]._queue.qsize() == 0)
    (core,) = [p for p in psutil.Process().children() if "wandb-core" in p.name()]
    core.kill()
    core.wait()
    train(tracker, state, 15)
    tracker.close()
    assert tracker._trackers.feeds[0]._queue.qsize() == 0, "it took everything"
    assert not tracker._trackers.feeds[0]._thread.is_alive()
    assert rows(tmp_path)[-1]["step"] == 20
    with warnings.catch_warnings():  # the dead helper's handle, which the library drops unasked
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_wandb_that_hangs_costs_no_step_and_a_bounded_end(tmp_path, monkeypatch):
    """An init that never returns must hold neither the loop nor the end of the job."""
    import wandb

    test_ends = threading.Event()

    def hang(**_):
        test_ends.wait()
        raise RuntimeError("the test has ended")

    monkeypatch.setattr(wandb, "init", hang)
    monkeypatch.setattr(feed, "CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(feed, "MOST_WAITING", 2)
    failures = num_failures()
    tracker = make(tmp_path, wandb=WandbMode.online)
    train(tracker, State(), 20)
    tracker.close()
    assert tracker._trackers.feeds[0]._thread.is_alive(), "nothing waited for it"
    assert num_failures() > failures, "values were left out, and counted"
    test_ends.set()


@pytest.mark.slow
def test_wandb_server_that_accepts_and_never_answers(tmp_path):
    """The real client against a dead server: the process ends by itself with the run's own exit code."""
    script = (
        "from pathlib import Path; from pipeline.tracking import feed, wandb_run; from pipeline.config.choices import WandbMode;"
        "from tests.tracking.test_metrics import make, train, State;"
        "wandb_run.WANDB_INIT_TIMEOUT_S = 3.0; feed.CLOSE_TIMEOUT_S = 1.0;"
        f"t = make(Path({str(tmp_path)!r}), wandb=WandbMode.online); train(t, State(), 20); t.close(); print('done')"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "WANDB_API_KEY": "0" * 40,
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
        }
        command = [sys.executable, "-c", script]
        done = subprocess.run(
            command,
            cwd=Path(metrics.__file__).parents[2],
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )
    assert (done.returncode, done.stdout.strip()) == (0, "done")
    assert rows(tmp_path)[-1]["step"] == 20
