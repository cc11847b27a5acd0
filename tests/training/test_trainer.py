"""A run on a real disk that fills, goes and comes back: it ends as an undisturbed one does, and tells everything."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.tensors import CheckpointTensors
from pipeline.tracking.afterwards import run_of
from tests.support.corpus import make_tokenizer
from tests.support.log_lines import unbroken
from tests.support.plant import Lead
from tests.support.token_dataset import write_dataset
from tests.support.waiting import HANG_S
from tests.tracking.test_metrics_page import documented_names, names_of

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
SETTINGS = [
    "name=a", "model=tiny", "model.num_layers=2", "model.hidden_size=32", "model.max_seq_len=32", "schedule.warmup_steps=2",
    f"training.total_steps={STEPS}", "training.global_batch_size=4", "training.micro_batch_size=2",
    "training.eval_every=0", "training.precision=fp32", "tracking.log_every=1", "tracking.sample_hash=true",
    "tracking.wandb=disabled", "checkpoint.save_every=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tokenizer = make_tokenizer(folder / "tokenizer.json", vocab_size=300).read_bytes()
    for split, stride in (("train", 7), ("validation", 11)):
        tokens = np.arange(8192) * stride % 300
        write_dataset(folder / split, [tokens], vocab_size=300, tokenizer=tokenizer)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for some checkpoints and the 64 MiB that a save leaves free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def start(data: Path, runs: Path, *settings: str, plant: str = "", **how: Any) -> subprocess.Popen:
    """pipeline.train as a process, under tests/support/plant.py."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PLANT": plant}
    command = [sys.executable, "tests/support/plant.py", "-m", "pipeline.train", f"data.path={data}", f"runs_dir={runs}",
               *SETTINGS, *settings]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, env=environment, **how)


def rows(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run, in order."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [row for row in map(json.loads, lines) if "train/loss" in row]


def results(run: Path) -> list[tuple]:
    """What must not depend on what the disk does."""
    names = ("step", "train/loss", "train/grad_norm", "data/sample_hash")
    return [tuple(row[name] for name in names) for row in rows(run)]


def wait_for(process: subprocess.Popen, claim: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + HANG_S
    while not claim():
        assert process.poll() is None, f"the run ended with {process.returncode} before {what}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.02)


def expect_equal_checkpoints(one: Path, other: Path) -> None:
    a, b = CheckpointTensors(one), CheckpointTensors(other)
    assert a.names == b.names
    for name in a.names:
        assert (a.tensor(name) == b.tensor(name)).all(), name


@pytest.mark.slow
def test_full_disk_deleted_folder_and_closed_terminal_cost_a_run_nothing(
    data: Path, tmp_path: Path, small_disk: Path
) -> None:
    """Each of these used to end a run, or would have been silent about what it lost."""
    alone = start(data, tmp_path, stderr=subprocess.PIPE)
    assert alone.wait(HANG_S) == 0, alone.communicate()
    alone.communicate()
    expected, run, fallback = results(tmp_path / "a"), small_disk / "a", tmp_path / "other"
    # Foreign things under logs/, of a crash or of people.
    (run / "logs" / "attempts").mkdir(parents=True)
    (run / "logs" / "attempts" / "0000.json").touch()
    (run / "logs" / "failures").write_text("mine")
    lead = Lead(tmp_path / "until", to=2)
    process = start(
        data, small_disk, f"checkpoint.fallback_dir={fallback}", plant=lead.plant, preexec_fn=lambda: os.close(2)
    )  # fmt: skip
    try:
        wait_for(process, lambda: len(rows(run)) >= 2, "second step")
        with pytest.raises(OSError, match="No space"), open(small_disk / "ballast", "wb") as file:
            while True:
                file.write(bytes(4096))
        lead.to(4)
        saved = fallback / "a" / "checkpoints"
        wait_for(process, lambda: folders.list_checkpoints(saved), "checkpoint in the fallback")
        (small_disk / "ballast").unlink()
        lead.to(8)
        written = (run / "checkpoints" / "latest").exists
        wait_for(process, written, "checkpoint in the run folder")
        seen = results(run)
        assert [row[0] for row in seen] == list(range(1, 9)), "no row was lost"
        # Its name first, at once: a save that is being written makes and renames files meanwhile.
        run.rename(gone := small_disk / "gone")
        shutil.rmtree(gone, ignore_errors=True)
        lead.to(STEPS)
        assert process.wait(HANG_S) == 0
    finally:
        process.kill()
        process.wait()
    later = results(run)
    assert [*seen, *later] == expected
    assert rows(run)[-1]["resilience/bookkeeping_failures"] > 0
    last = folders.name_of(STEPS)
    expect_equal_checkpoints(run / "checkpoints" / last, tmp_path / "a" / "checkpoints" / last)
    assert (run / "DONE").exists()


@pytest.mark.slow
def test_a_run_goes_on_at_the_newest_checkpoint_though_it_is_in_the_fallback(
    data: Path, tmp_path: Path
) -> None:
    """HUP ends the first start, whose folder takes no checkpoint; the second finds what it saved elsewhere."""
    run, fallback = tmp_path / "a", f"checkpoint.fallback_dir={tmp_path / 'other'}"
    run.mkdir()
    (run / "checkpoints").write_text("in the place of the folder")
    lead = Lead(tmp_path / "until", to=5)
    first = start(data, tmp_path, fallback, plant=lead.plant, stderr=subprocess.PIPE, text=True)
    wait_for(first, lambda: len(rows(run)) >= 5, "fifth step")
    first.send_signal(signal.SIGHUP)
    lead.to(STEPS)
    errors = first.communicate(timeout=HANG_S)[1]
    assert first.returncode == 0, errors
    left = len(rows(run))
    assert left < STEPS and "trying" in errors
    (run / "checkpoints").unlink()
    second = start(data, tmp_path, fallback, stderr=subprocess.PIPE, text=True)
    errors = second.communicate(timeout=HANG_S)[1]
    assert second.returncode == 0, errors
    newest = f"{tmp_path / 'other'}/a/checkpoints/{folders.name_of(left)}"
    assert f"resumed from {newest}" in unbroken(errors)
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    assert folders.list_checkpoints(run / "checkpoints")[-1][0] == STEPS


@pytest.mark.slow
def test_trackers_draw_each_step_once_through_a_full_disk_a_kill_and_a_rollback(
    data: Path, tmp_path: Path, small_disk: Path
) -> None:
    """And are told of the run when it has ended; what it wrote all along is what docs/watching.md names."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = small_disk / "a"
    drawn, fallback = run / "tensorboard" / "by-step", f"checkpoint.fallback_dir={tmp_path}"
    lead = Lead(tmp_path / "until", to=5)
    first = start(data, small_disk, "tracking.tensorboard=true", "optimizer.lr=0.01", fallback, plant=lead.plant)  # fmt: skip
    try:
        wait_for(first, lambda: told(drawn / "told.json") >= 5, "fifth step in TensorBoard")
        with pytest.raises(OSError, match="No space"), open(small_disk / "ballast", "wb") as file:
            while True:
                file.write(bytes(4096))
        lead.to(8)
        wait_for(first, lambda: folders.list_checkpoints(tmp_path / "a/checkpoints"), "fallback")
        (small_disk / "ballast").unlink()
        lead.to(10)
        wait_for(first, lambda: len(rows(run)) >= 10, "tenth step, logged")
    finally:
        first.kill()  # TensorBoard would have been tried again after half a minute
        first.wait()
    assert told(drawn / "told.json") < 10
    settings = ["optimizer.lr=0.01", "resilience.on_spike=rollback", "resilience.spike_window=8", "resilience.spike_sigmas=5",
                "training.eval_every=8", "training.eval_sequences=4", "training.sample_every=12",
                "training.sample_tokens=4", "tracking.wandb=offline", "tracking.tensorboard=true"]  # fmt: skip
    second = start(data, small_disk, *settings, fallback, plant=f"spike={4 * 18 + 1}")
    assert second.wait(HANG_S) == 0
    steps = [row["step"] for row in rows(run)]
    back = [(a, b) for a, b in itertools.pairwise(steps) if b <= a]
    assert len(back) == 2, f"after the kill and after the rollback: {steps}"
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text("{}")
    run_of(run).tell(lambda tracker, at: tracker.keep_model(at, exported, {}))
    reader = reading.EventAccumulator(
        str(drawn), size_guidance={"scalars": 0, "tensors": 0}
    ).Reload()
    later = {row["step"]: row["train/loss"] for row in rows(run)}
    points = [(event.step, event.value) for event in reader.Scalars("train/loss")]
    assert points == [(step, pytest.approx(later[step])) for step in range(1, STEPS + 1)]
    assert [event.step for event in reader.Scalars("val/validation/loss")] == [8, 16, 24]
    texts = [event.tensor_proto.string_val[0].decode() for event in reader.Tensors("summary/text_summary")]  # fmt: skip
    for name in ("best/step", "final/validation/loss"):
        assert any(name in text for text in texts), name
    (model,) = reader.Tensors("model/text_summary")
    assert model.step == STEPS and b"exported" in model.tensor_proto.string_val[0]
    assert told(run / "wandb-told.json") == STEPS
    logs = [path.read_bytes() for path in run.glob("wandb/offline-run-*/run-*.wandb")]
    assert len(logs) == 2 and any(str(exported).encode() in log for log in logs)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert set().union(*map(names_of, lines)) <= documented_names()


def told(mark: Path) -> int:
    """The newest step of the loss that a tracker was told."""
    try:
        return json.loads(mark.read_text()).get("train/loss", 0)
    except FileNotFoundError:
        return 0
