"""launch/local.sh: N processes whose end, notice or failure is the end of all."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.corpus import make_tokenizer
from tests.support.plant import Lead
from tests.support.token_dataset import write_dataset
from tests.support.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "local.sh"

# Stands for `python -m pipeline.train`: behaves as its first setting says.
RANK = """
import os, signal, sys, time
module, rank = sys.argv[1], int(os.environ.get("RANK", -1))
if module == "pipeline.preflight":
    sys.exit(2 if "bad" in sys.argv else 0)
told = []
signal.signal(signal.SIGUSR2, lambda *_: told.append(1))
open(f"{os.getcwd()}/rank{rank}", "w").write(f"{os.getpid()} {os.environ['WORLD_SIZE']} {os.environ['MASTER_PORT']}")
if "fail" in sys.argv and rank == 1:
    sys.exit(7)
if "quick" not in sys.argv:
    while not told:
        time.sleep(0.05)
    open(f"{os.getcwd()}/saved{rank}", "w").close()
"""


@pytest.fixture
def launch(tmp_path):
    """Start local.sh of a clone whose path has blanks, with a stand-in for its python, in an empty folder."""
    clone, real = tmp_path / "my clone", sys.executable
    shutil.copytree(SCRIPT.parent, clone / "launch")
    program = clone / ".venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    (clone / ".venv" / "pyvenv.cfg").touch()
    program.write_text(
        f'#!/bin/bash\n[[ $1 == -m ]] && exec {real} {tmp_path}/rank.py "${{@:2}}"\nexec {real} "$@"\n'
    )
    program.chmod(0o755)
    (tmp_path / "rank.py").write_text(RANK)
    environment = {**os.environ}
    environment.pop("PYTHON", None)
    started = []

    def start(*arguments: str, in_background: bool = False) -> subprocess.Popen:
        # `nohup`, `&` and many CI runners start their children with Ctrl-C ignored.
        ctrl_c = signal.SIG_IGN if in_background else signal.SIG_DFL
        process = subprocess.Popen(
            [clone / "launch" / "local.sh", *arguments],
            cwd=tmp_path,
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, ctrl_c),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def pids(folder: Path, count: int) -> list[int]:
    """Process ids of the ranks once all have started."""
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline:
        found = [path.read_text().split() for path in sorted(folder.glob("rank[0-9]"))]
        if len(found) == count and all(found):
            return [int(words[0]) for words in found]
        time.sleep(0.05)
    raise AssertionError(f"{count} ranks did not start")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_dead(processes: list[int]) -> None:
    deadline = time.monotonic() + HANG_S
    while any(is_alive(pid) for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in processes if is_alive(pid)] == []


def wait_until_caught(process: subprocess.Popen, number: int) -> None:
    """Return once the script has its trap: a signal before it would kill."""
    deadline = time.monotonic() + HANG_S
    status = Path(f"/proc/{process.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> number - 1 & 1:
        assert time.monotonic() < deadline, f"signal {number} is never caught"
        time.sleep(0.02)


def test_ranks_get_their_place_and_end_well(launch, tmp_path):
    """Each rank learns the same world and the same port."""
    assert launch("3", "quick").wait(HANG_S) == 0
    facts = {tuple(path.read_text().split()[1:]) for path in tmp_path.glob("rank[0-9]")}
    assert len(facts) == 1
    assert facts.pop()[0] == "3"


def test_wrong_setting_ends_before_any_rank_starts(launch, tmp_path):
    """The message is printed once, and the exit code is the check's."""
    assert launch("3", "bad").wait(HANG_S) == 2
    assert not list(tmp_path.glob("rank[0-9]"))


def test_one_rank_that_fails_ends_all_with_its_code(launch, tmp_path):
    """The others would wait in a collective for ever."""
    process = launch("3", "fail")
    ranks = pids(tmp_path, 3)
    assert process.wait(HANG_S) == 7
    wait_until_dead(ranks)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP])
def test_notice_reaches_every_rank_and_waits_for_their_save(launch, tmp_path, number):
    """A notice to the script is a notice to the run."""
    process = launch("2", "run")
    pids(tmp_path, 2)
    wait_until_caught(process, number)
    process.send_signal(number)
    assert process.wait(HANG_S) == 0
    assert len(list(tmp_path.glob("saved*"))) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_run_in_the_background_obeys_notices(launch, tmp_path, number):
    """Bash cannot trap a signal that was ignored when it started; the others must work all the same."""
    process = launch("2", "run", in_background=True)
    pids(tmp_path, 2)
    wait_until_caught(process, number)
    process.send_signal(signal.SIGINT)
    process.send_signal(number)
    assert process.wait(HANG_S) == 0
    assert len(list(tmp_path.glob("saved*"))) == 2


def test_no_rank_outlives_a_killed_launcher(launch, tmp_path):
    """An orphan would write into the run that is started again."""
    process = launch("2", "run")
    ranks = pids(tmp_path, 2)
    process.kill()
    process.wait(HANG_S)
    wait_until_dead(ranks)


@pytest.mark.parametrize("arguments", [[], ["model=tiny"], ["0"]])
def test_usage_is_shown_without_a_number_of_processes(launch, arguments):
    """`launch/local.sh model=tiny` is the likely slip."""
    assert launch(*arguments).wait(HANG_S) == 2


@pytest.mark.slow
def test_a_shard_that_shrinks_under_the_trainer_is_named(tmp_path):
    """The kernel kills who reads a mapped file behind its new end (SIGBUS): stacks told nobody which file."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json", vocab_size=300).read_bytes()
    for split in ("train", "validation"):
        write_dataset(tmp_path / "data" / split, [np.arange(8192) % 300] * 2, vocab_size=300, tokenizer=tokenizer)  # fmt: skip
    settings = [
        f"data.path={tmp_path}/data", f"runs_dir={tmp_path}/runs", "name=a", "model=tiny", "model.num_layers=2",
        "model.hidden_size=32", "model.max_seq_len=32", "training.total_steps=100", "training.global_batch_size=4",
        "training.micro_batch_size=2", "training.precision=fp32", "training.eval_every=0", "schedule.warmup_steps=2",
        "tracking.log_every=1", "tracking.wandb=disabled",
    ]  # fmt: skip
    lead = Lead(tmp_path / "until", to=1)
    environment = {
        **os.environ,
        "PYTHON": f"{sys.executable} {ROOT}/tests/support/plant.py",
        "PLANT": lead.plant,
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen([SCRIPT, "1", *settings], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)  # fmt: skip
    metrics = tmp_path / "runs" / "a" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + HANG_S
        while not (metrics.exists() and "train/loss" in metrics.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        shards = sorted((tmp_path / "data" / "train").rglob("*.tar"))
        for shard in shards:
            os.truncate(shard, 1000)
        lead.to(100)
        errors = process.communicate(timeout=HANG_S)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + signal.SIGBUS, errors
    last = errors[errors.rindex("error: ") :]
    assert "2 of 2 shards are missing or truncated" in last and shards[0].name in last, errors
    assert "(1000 bytes, " in last and "SIGBUS" in last
