"""A sweep: every point is made, whatever becomes of the others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.errors import ConfigError
from pipeline.scaling import runs
from pipeline.sweep import SweepConfig, main
from tests.support.plant import Lead
from tests.support.small_runs import overrides, write_data
from tests.support.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[1]
SWEPT = ["optimizer.lr=0.01,0.001", "seed=1,2"]
LAUNCHER = """#!/bin/bash
for word; do case $word in runs_dir=*) runs=${word#*=};; name=*) name=${word#*=};; esac; done
mkdir -p "$runs/$name"; echo "$@" >> "$runs/$name/starts"
echo '{"step": 4, "tokens": 64, "train/loss": 2.5, "throughput/tokens_per_sec": 10.0}' > "$runs/$name/metrics.jsonl"
[[ $name == *"$FATAL"* ]] && kill -9 $$
touch "$runs/$name/DONE"
"""


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepConfig:
    """Whose points are made by a launcher that kills itself where the name has FATAL in it."""
    path = tmp_path / "launcher"
    path.write_text(LAUNCHER)
    path.chmod(0o755)
    monkeypatch.setattr(runs, "LAUNCHER", path)
    monkeypatch.setenv("FATAL", "lr=0.01,seed=2")
    return SweepConfig(name="s", runs_dir=str(tmp_path))


def states(text: str) -> list[str]:
    return [line.split("|")[4].strip() for line in text.splitlines() if re.match(r"\| \d", line)]


def test_a_killed_point_does_not_end_the_others_and_is_made_again(
    sweep: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The same command goes on with it alone."""
    assert main(sweep, [*SWEPT, "training.total_steps=4"]) == 1
    table = (tmp_path / "s" / "table.md").read_text()
    assert states(table) == ["done", "FAILED, exit code -9", "done", "done"]
    assert table.strip() in capsys.readouterr().out and "not done: 1." in table
    assert (tmp_path / "s" / "curves.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setenv("FATAL", "none")
    assert main(sweep, [*SWEPT, "training.total_steps=4"]) == 0
    assert states((tmp_path / "s" / "table.md").read_text()) == ["done"] * 4
    starts = [
        (path / "starts").read_text().splitlines() for path in sorted((tmp_path / "s").glob("0*"))
    ]
    assert [len(of) for of in starts] == [1, 2, 1, 1]
    words = f"training.total_steps=4 optimizer.lr=0.01 seed=2 runs_dir={tmp_path}/s name=001-lr=0.01,seed=2"
    assert starts[1][1] == f"1 {words}"


def test_a_task_of_an_array_makes_its_point_alone(sweep: SweepConfig, tmp_path: Path) -> None:
    """And the login node writes the table without making any."""
    sweep.point = 2
    assert main(sweep, SWEPT) == 0
    assert [path.name for path in (tmp_path / "s").glob("0*")] == ["002-lr=0.001,seed=1"]
    sweep.point, sweep.run = None, False
    assert main(sweep, SWEPT) == 1
    assert states((tmp_path / "s" / "table.md").read_text()) == ["not begun", "not begun", "done", "not begun"]  # fmt: skip
    sweep.point = 4
    with pytest.raises(ConfigError, match="must be between 0 and 3"):
        main(sweep, SWEPT)


def test_all_points_are_checked_before_the_first_is_made(
    sweep: SweepConfig, tmp_path: Path
) -> None:
    """Half a sweep before a typed mistake is a night lost."""
    with pytest.raises(ConfigError) as caught:
        main(sweep, ["training.micro_batch_size=1,0", "optimizer.lr=0.1,x"])
    told = str(caught.value)
    assert "point 1 (001-" in told and "optimizer.lr" in told
    assert "point 2 (002-" in told and "training.micro_batch_size (0) must be at least 1" in told
    assert "point 0" not in told and not (tmp_path / "s").exists()


def test_a_point_that_was_made_with_other_settings_is_not_taken_for_done(
    sweep: SweepConfig, tmp_path: Path
) -> None:
    """The table would show the numbers of the sweep before under the settings of this one."""
    words = [*SWEPT, "training.total_steps=4", "data.path=one"]
    assert main(sweep, words) == 1
    done = tmp_path / "s" / "000-lr=0.01,seed=1"
    cfg = cli.compose(
        PretrainConfig, [*words[2:], "optimizer.lr=0.01", "seed=1"], config="pretrain"
    )
    (done / "config.yaml").write_text(cli.to_yaml(cfg))
    assert main(sweep, [*words, "checkpoint.save_every=9"]) == 1  # which no weight depends on
    for change, said in (
        ("training.total_steps=8", "total_steps: 4 then, 8 now"),
        ("data.path=two", "one/train.* now"),
    ):
        with pytest.raises(
            ConfigError, match=rf"point 0 .*is done, with other settings.*{said}.*name="
        ):
            main(sweep, [*words, change])


def test_multirun_of_train_is_a_sweep(tmp_path: Path) -> None:
    """Hydra's spelling; without it `seed=1,2` is a value that no run has."""
    words = ["--multirun", *SWEPT, "run=false", f"runs_dir={tmp_path}", "name=s"]
    command = [sys.executable, "-m", "pipeline.train", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 1, done.stderr  # none of the points is done
    assert states(done.stdout) == ["not begun"] * 4
    assert (tmp_path / "s" / "table.md").read_text() == done.stdout


def kill_the_second(sweep_process: subprocess.Popen, run: Path, lead: Lead) -> None:
    """Kill -9 the training of a point that waits at its first logged step, and let the others go on."""
    end = time.monotonic() + HANG_S
    while not (run / "metrics.jsonl").exists() or "train/loss" not in (run / "metrics.jsonl").read_text():  # fmt: skip
        assert time.monotonic() < end
        time.sleep(0.05)
    for child in psutil.Process(sweep_process.pid).children(recursive=True):
        if "pipeline.train" in child.cmdline() and f"name={run.name}" in child.cmdline():
            os.kill(child.pid, signal.SIGKILL)
    lead.to(4)


@pytest.mark.slow
def test_real_runs_one_killed_by_train_multirun(tmp_path: Path) -> None:
    """Four trainings through `pipeline.train --multirun`; the table says which one was killed."""
    data = write_data(tmp_path / "data")
    words = [word for word in overrides(data, tmp_path / "runs", "s", **{"training.total_steps": 4, "checkpoint.save_every": 0,
             "training.eval_every": 0, "model.num_layers": 2}) if not word.startswith("seed=")]  # fmt: skip
    command = [sys.executable, "-m", "pipeline.train", "--multirun", *words, *SWEPT]
    lead = Lead(tmp_path / "until", to=1)
    python = f"{sys.executable} {ROOT}/tests/support/plant.py"
    environment = {**os.environ, "PYTHON": python, "PLANT": lead.plant}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:  # fmt: skip
        killer = threading.Thread(
            target=kill_the_second,
            args=(process, tmp_path / "runs" / "s" / "001-lr=0.01,seed=2", lead),
            daemon=True,
        )
        killer.start()
        out, _ = process.communicate(timeout=HANG_S)
    assert process.returncode == 1
    found = states(out)
    assert found[1].startswith("FAILED") and [*found[:1], *found[2:]] == ["done"] * 3, out
    for name in ("000-lr=0.01,seed=1", "003-lr=0.001,seed=2"):
        config = (tmp_path / "runs" / "s" / name / "config.yaml").read_text()
        assert f"name: {name}" in config
    rows = (tmp_path / "runs/s/000-lr=0.01,seed=1/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 4
