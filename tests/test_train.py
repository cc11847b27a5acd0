"""Whole runs through the entry point: layouts, kills, resumes, and errors before anything starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.record import read_record
from pipeline.errors import DataUsedUp, PipelineError
from pipeline.tracking.samples import read_samples
from tests.support.plant import Lead
from tests.support.preloaded import Preloaded
from tests.support.ranks import run_on_ranks
from tests.support.small_runs import (
    LOOKS,
    STEPS,
    heads,
    history,
    overrides,
    train_on_ranks,
    validation,
    write_data,
)
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_four_ranks_train_as_one_process(data: Path, tmp_path: Path) -> None:
    """Tensor and pipeline parallel through the whole trainer: same samples, losses, norms, held-out loss."""
    layout = LOOKS | {f"parallel.{name}_parallel_size": 2 for name in ("tensor", "pipeline")}
    run_on_ranks(train_on_ranks, 1, overrides(data, tmp_path, "one", **LOOKS))
    run_on_ranks(train_on_ranks, 4, overrides(data, tmp_path, "four", **layout))
    one, four = history(tmp_path / "one"), history(tmp_path / "four")
    assert list(one) == list(four) == list(range(1, STEPS + 1))
    for step in one:
        assert four[step][2] == one[step][2], "other samples"
        assert four[step][:2] == pytest.approx(one[step][:2], rel=1e-5)
    scores = validation(tmp_path / "one")
    assert validation(tmp_path / "four") == pytest.approx(scores, rel=1e-5) and len(scores) == 2
    assert heads(tmp_path / "four") == pytest.approx(heads(tmp_path / "one"), abs=1e-5)
    one, four = (read_samples(tmp_path / name) for name in ("one", "four"))
    assert list(one) == [5, 10] and four == one


def train_and_adapt(base: list[str], adapter: list[str]) -> None:
    """A base, an adapter of it to its end, in one process."""
    train_on_ranks(base)
    train_on_ranks(adapter)


@pytest.mark.slow
def test_an_adapter_goes_on_beside_its_base_at_another_layout(data: Path, tmp_path: Path) -> None:
    """The whole command: the base is read at every start, checkpoints hold what is trained, losses go on."""
    given = {"schedule": "constant", "training.eval_every": 0, "schedule.warmup_steps": 0}
    base = overrides(data, tmp_path, "base", **{**given, "training.total_steps": 2})
    beside = {**given, "finetune": "lora", "checkpoint.init_from": tmp_path / "base"}
    whole = {**beside, "training.total_steps": 6}
    run_on_ranks(train_and_adapt, 1, base, overrides(data, tmp_path, "one", **whole))
    for steps, layout in (
        (3, {"parallel.zero_stage": 3}),
        (6, {"parallel.pipeline_parallel_size": 2}),
    ):
        arguments = {**beside, "training.total_steps": steps, **layout}
        run_on_ranks(train_on_ranks, 2, overrides(data, tmp_path, "two", **arguments))
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    assert list(one) == list(two) == list(range(1, 7))
    for step in one:
        assert two[step][:2] == pytest.approx(one[step][:2], rel=1e-5), step
    record = read_record(tmp_path / "two/checkpoints/step-00000006")
    assert record.base is not None and record.base["path"].startswith(str(tmp_path / "base"))
    size = {name: sum(f.stat().st_size for f in (tmp_path / name).glob("checkpoints/*6/rank-*"))
            for name in ("one", "two")}  # fmt: skip
    whole_size = sum(f.stat().st_size for f in (tmp_path / "base").glob("checkpoints/*2/rank-*"))
    assert 0 < size["two"] < whole_size / 4 and 0 < size["one"] < whole_size / 4
    with pytest.raises(PipelineError, match="is not the base of this adapter"):
        other = {**whole, "training.total_steps": 9, "checkpoint.init_from": tmp_path / "one"}
        train_on_ranks(overrides(data, tmp_path, "two", **other))


def test_a_killed_run_goes_on_bitwise(data: Path, tmp_path: Path) -> None:
    """kill -9 in mid-run, dropout on: the same command continues with the samples and losses of an undisturbed run."""
    dropout = {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}
    run_on_ranks(train_on_ranks, 1, overrides(data, tmp_path, "whole", **dropout))
    command = [sys.executable, "tests/support/plant.py", "-m", "pipeline.train"]
    command += overrides(data, tmp_path, "killed", **dropout)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PLANT": Lead(tmp_path / "until", to=6).plant}  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    run = tmp_path / "killed"
    saved = (run / "checkpoints" / "latest").exists
    wait_until(lambda: saved() or process.poll() is not None)
    assert saved(), "no checkpoint appeared"
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = history(run)
    run_on_ranks(train_on_ranks, 1, overrides(data, tmp_path, "killed", **dropout))
    assert 3 <= max(before) < STEPS
    assert history(run) == history(tmp_path / "whole")


def test_a_run_continues_at_another_layout(data: Path, tmp_path: Path) -> None:
    """Stopped at one process, resumed at tensor parallel 2 with other micro-batches: samples equal, losses within rounding."""
    run_on_ranks(train_on_ranks, 1, overrides(data, tmp_path, "whole"))
    short = overrides(data, tmp_path, "moved", **{"training.total_steps": STEPS})
    run_on_ranks(train_and_stop, 1, short, 6)
    assert max(history(tmp_path / "moved")) == 6
    layout = {
        "parallel.tensor_parallel_size": 2,
        "parallel.sequence_parallel": "true",
        "training.micro_batch_size": 4,
    }
    run_on_ranks(train_on_ranks, 2, overrides(data, tmp_path, "moved", **layout))
    whole, moved = history(tmp_path / "whole"), history(tmp_path / "moved")
    assert [moved[s][2] for s in moved] == [whole[s][2] for s in whole]
    for step in whole:
        assert moved[step][:2] == pytest.approx(whole[step][:2], rel=1e-4)


def test_data_parallel_ranks_come_and_go(data: Path, tmp_path: Path) -> None:
    """30 steps in one process; 13 in one, then up to 21 on two ranks, the rest on four, each with other micro-batches."""
    steps = {"training.total_steps": 30, "training.eval_every": 0, "model.num_layers": 2}
    run_on_ranks(train_on_ranks, 1, overrides(data, tmp_path, "whole", **steps))
    run_on_ranks(train_and_stop, 1, overrides(data, tmp_path, "elastic", **steps), 13)
    two, four = ({**steps, "training.micro_batch_size": size} for size in (4, 1))
    run_on_ranks(train_and_stop, 2, overrides(data, tmp_path, "elastic", **two), 21)
    assert max(history(tmp_path / "elastic")) == 21
    run_on_ranks(train_on_ranks, 4, overrides(data, tmp_path, "elastic", **four))
    whole, elastic = history(tmp_path / "whole"), history(tmp_path / "elastic")
    assert sorted(elastic) == list(range(1, 31))
    assert [elastic[step][2] for step in whole] == [whole[step][2] for step in whole]
    for step in whole:
        assert elastic[step][:2] == pytest.approx(whole[step][:2], rel=1e-4)


def train_and_stop(arguments: list[str], step: int) -> int:
    """pipeline.train, given notice after `step`."""
    from pipeline.resilience import notice
    from pipeline.training import trainer

    advance = trainer.TrainState.advance

    def advance_and_stop(self: Any, *args: Any) -> None:
        advance(self, *args)
        if self.step == step:
            notice._received.append(signal.SIGUSR2)

    trainer.TrainState.advance = advance_and_stop  # type: ignore[method-assign]
    return train_on_ranks(arguments)


def train_late(arguments: list[str], faults: dict[str, float]) -> int:
    """pipeline.train with planted faults, each step judged one step late as on CUDA."""
    from pipeline.resilience import step_agreement
    from tests.support import plant

    start = step_agreement.StepAgreement.__init__

    def late(self: Any, *args: Any) -> None:
        start(self, *args)
        self.is_late = True

    step_agreement.StepAgreement.__init__ = late  # type: ignore[method-assign]
    plant.install(faults)
    return train_on_ranks(arguments)


def ledger(run: Path, step: int) -> tuple[int, list[tuple[int, str, str]]]:
    """(skipped steps, [(step, kind, action)]) as a checkpoint holds them."""
    record = read_record(run / "checkpoints" / f"step-{step:08d}")
    return record.state["skipped_steps"], [
        (e["step"], e["kind"], e["action"]) for e in record.guard["ledger"]
    ]


def test_a_checkpoint_knows_what_became_of_its_last_step(data: Path, tmp_path: Path) -> None:
    """Though the host hears of a step after the next one has begun: step 2, the third, has a NaN and is saved."""
    arguments = overrides(
        data, tmp_path, "late", **{"training.total_steps": 5, "training.eval_every": 0}
    )
    run_on_ranks(train_late, 1, arguments, {"nan": 2 * 8 + 3})
    for step in (3, 5):
        assert ledger(tmp_path / "late", step) == (1, [(2, "bad_numbers", "skip")])


def test_a_step_that_a_rollback_undid_is_not_judged(data: Path, tmp_path: Path) -> None:
    """Step 19 spikes, and step 20, begun before that was known, is bad too; both are undone, one is judged."""
    settings = {
        "training.total_steps": 23,
        "training.eval_every": 0,
        "resilience.on_spike": "rollback",
        "optimizer.lr": 0.01,
    }
    arguments = overrides(
        data,
        tmp_path,
        "late",
        **settings,
        **{"resilience.spike_window": 8, "resilience.spike_sigmas": 5},
    )
    run_on_ranks(train_late, 1, arguments, {"spike": 19 * 8 + 3, "nan": 20 * 8 + 3, "label": 399})
    assert ledger(tmp_path / "late", 23) == (0, [(19, "spike", "rollback")])


def test_one_folder_has_one_run_and_the_next_start_goes_on_after_a_kill(
    data: Path, tmp_path: Path, server: Preloaded
) -> None:
    """The same line started twice is an everyday mistake; so is a kill -9 of what runs.

    The first stands still between two saves: killed in one, it would have saved more than `latest` names.
    """
    run = tmp_path / "run"
    settings = {"training.eval_every": 0, "checkpoint.keep_last": 99}
    command = [sys.executable, "-m", "pipeline.train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PLANT": Lead(tmp_path / "until", to=4).plant}  # fmt: skip
    common: dict[str, Any] = {"cwd": ROOT, "env": environment, "text": True, "stderr": subprocess.PIPE}  # fmt: skip
    led = [command[0], "tests/support/plant.py", *command[1:]]
    first = subprocess.Popen([*led, *overrides(data, tmp_path, **settings)], **common)
    try:
        saved_one = (run / "checkpoints" / "latest").exists
        wait_until(lambda: saved_one() or first.poll() is not None)
        assert saved_one(), "no checkpoint appeared"
        config = (run / "config.yaml").read_text()
        second = subprocess.run(
            [
                *command,
                *overrides(data, tmp_path, **settings, **{"training.total_steps": 100_001}),
            ],
            **common,
        )
    finally:
        first.kill()
        first.communicate()
    assert second.returncode == 2
    assert f"{run} is in use by process {first.pid} on " in second.stderr
    assert (run / "config.yaml").read_text() == config
    starts = [
        line
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if '"event":"start"' in line
    ]
    assert len(starts) == 1
    saved = int((run / "checkpoints" / "latest").read_text().removeprefix("step-"))
    command[:1] = server.python.split()
    third = subprocess.run(
        [*command, *overrides(data, tmp_path, **settings, **{"training.total_steps": saved + 2})],
        **common,
    )
    assert third.returncode == 0, third.stderr
    assert f"{run}/checkpoints/step-{saved:08d}\n" in third.stderr  # resumed from it
    assert (run / "DONE").exists()


def used_up(arguments: list[str]) -> str:
    """pipeline.train, which raises DataUsedUp; its message."""
    with pytest.raises(DataUsedUp) as caught:
        train_on_ranks(arguments)
    return str(caught.value)


def test_a_run_whose_data_is_used_up_saves_before_it_says_so(data: Path, tmp_path: Path) -> None:
    """The steps since the last save_every would be trained again, or, with the data gone, never kept."""
    train = f"[{{path: {data}/train, max_epochs: 0.02}}]"
    settings = {
        "training.total_steps": 100,
        "checkpoint.save_every": 50,
        "data.train": train,
        "training.eval_every": 0,
    }
    (message,) = run_on_ranks(used_up, 1, overrides(data, tmp_path, "short", **settings))
    assert "used up" in message and "max_epochs" in message
    done = max(history(tmp_path / "short"))
    assert 1 < done < 50
    assert (tmp_path / "short/checkpoints/latest").read_text() == f"step-{done:08d}\n"


def watched_at_the_end(arguments: list[str]) -> bool:
    """Whether a watchdog still counts the seconds when the trackers are told the end."""
    from pipeline.tracking.metrics import Metrics

    close, seen = Metrics.close, []

    def look(self: Metrics, exit_code: int = 0) -> None:
        seen.append(any(thread.name == "watchdog" for thread in threading.enumerate()))
        close(self, exit_code)

    Metrics.close = look  # type: ignore[method-assign]
    train_on_ranks(arguments)
    (watched,) = seen
    return watched


def test_a_slow_tracker_does_not_end_a_finished_run(data: Path, tmp_path: Path) -> None:
    """W&B took longer for its last rows than the watchdog waits: a night's run ended in an error."""
    arguments = overrides(data, tmp_path, **{"training.total_steps": 2, "training.eval_every": 0})
    assert not run_on_ranks(watched_at_the_end, 1, arguments)[0]


def stumble(arguments: list[str]) -> None:
    """pipeline.train, whose first evaluation raises."""
    from pipeline.evaluation import perplexity

    def fall(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    perplexity.Evaluator.run = fall  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        train_on_ranks(arguments)


@pytest.mark.parametrize("last, every, due", [(10, 3, 3), (4, 100, 0)], ids=["amid", "at the end"])
def test_an_evaluation_that_fails_costs_no_step(
    data: Path, tmp_path: Path, last: int, every: int, due: int
) -> None:
    """The state of the step is on its way to the disk before its evaluation begins."""
    settings = {"training.total_steps": last, "checkpoint.save_every": every, "training.eval_every": due,
                "checkpoint.asynchronous": "false"}  # fmt: skip
    run_on_ranks(stumble, 1, overrides(data, tmp_path, "stumbles", **settings))
    saved = sorted(path.name for path in (tmp_path / "stumbles/checkpoints").glob("step-*"))
    assert saved == [f"step-{due or last:08d}"]


def test_an_evaluation_that_a_kill_took_is_made_up_for(data: Path, tmp_path: Path) -> None:
    """Saving comes before evaluating, so a kill between the two lost the row of that step for ever."""
    settings = {"training.eval_every": 3, "checkpoint.asynchronous": "false"}
    run_on_ranks(train_on_ranks, 1, overrides(data, tmp_path, "whole", **settings))
    run_on_ranks(stumble, 1, overrides(data, tmp_path, "stumbled", **settings))
    assert list(validation(tmp_path / "stumbled")) == []
    for _ in range(2):  # the second start finds the run done, and every evaluation where it belongs
        run_on_ranks(train_on_ranks, 1, overrides(data, tmp_path, "stumbled", **settings))
        assert list(validation(tmp_path / "stumbled")) == [3, 6, 9, 10]
        assert validation(tmp_path / "stumbled") == validation(tmp_path / "whole")
        assert history(tmp_path / "stumbled") == history(tmp_path / "whole")
    rows = (tmp_path / "stumbled/metrics.jsonl").read_text()
    assert rows.count("val/validation/loss") == 4, "none is made twice"
