"""One long run that a campaign of faults strikes: four ranks, TP2 x PP2, asynchronous saves.

    LocalRun   launch/local.sh on this machine    SlurmRun   launch/pretrain.slurm on the test Slurm

Both say how far the run is, start it again when it has ended, and write the same folder: the disturbed run may go on
under either. The run has no last step until the campaign gives it one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from tests.support.preloaded import Preloaded
from tests.support.slurm_cluster import REPO, Job, SlurmCluster
from tests.support.token_dataset import write_dataset

ON_AGAIN_S = 3600.0
"""A start that imports takes 15 s on two idle cores, and more than ten minutes on two that ten others share. Nothing is
lost by waiting: who really stands still is ended by the watchdog."""
HANG_S = 60
SLOW_S = 900.0
"""Within which what is dead has ended, on a machine that gives a minute of CPU in it."""
ENDLESS = 1_000_000
PROGRAM = "pipeline.train"
DIE_WITH_US = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
SETTINGS = [
    "data.validation=[]", "model.num_layers=2", "model.hidden_size=32", "model.max_seq_len=32",
    "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2", "schedule=constant", "schedule.warmup_steps=20",
    "training.global_batch_size=4", "training.micro_batch_size=2", "training.precision=fp32", "optimizer.lr=0.003",
    "tracking.log_every=1", "tracking.sample_hash=true", "checkpoint.save_every=3", "checkpoint.keep_last=3",
    f"resilience.hang_timeout_s={HANG_S}", "resilience.collective_timeout_s=120",
]  # fmt: skip


class CampaignError(AssertionError):
    """A fault was not survived, or left a trace."""


def write_data(folder: Path) -> None:
    """Tokens of which each is one of four that may follow the one before: there is something to learn."""
    tokens = np.cumsum(np.random.default_rng(0).integers(0, 4, 8192) * 5 + 1) % 64
    write_dataset(folder / "train", np.split(tokens, 2), block_tokens=1024, vocab_size=64)


def wait_for(claim: Callable[[], object], timeout_s: float) -> bool:
    """Whether `claim` came true in time."""
    deadline = time.monotonic() + timeout_s
    while not claim():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Progress:
    """The logged steps of a run, read as they come."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.rows: list[dict] = []
        self.reached = 0
        self._offset = 0

    def read(self) -> int:
        """The highest step that was ever logged."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return 0
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # half a line, of a killed process
                continue
            if "train/loss" in row:
                self.rows.append(row)
                self.reached = max(self.reached, row["step"])
        return self.reached


class Run(Protocol):
    """What a fault strikes."""

    run_dir: Path
    disk: Path
    """Where the run's folder lies; a small file system of its own on this machine, if we are root."""
    starts: int

    def start(self) -> None:
        """Start, or start again, after the one before has ended."""

    def has_ended(self) -> bool:
        """Whether somebody has to start it again."""

    def log(self) -> str:
        """What the present start has printed."""

    def stop(self) -> None:
        """Nothing of it runs any more."""


class LocalRun:
    """The run under launch/local.sh."""

    def __init__(
        self, disk: Path, data: Path, *, preloaded: Preloaded, plain_every: int, name: str = "disturbed",
        settings: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.preloaded, self._plain_every, self._is_forked = preloaded, plain_every, True
        self.disk, self.run_dir, self.starts = disk, disk / name, 0
        # Behind the folder, not in it: a full disk must not end what tells of it.
        self.log_path = data.parent / f"{name}.log"
        self.clock = WallClock(data.parent)
        self.set_clock(0)
        self.settings = [
            f"name={name}", f"runs_dir={disk}", f"data.path={data}", *SETTINGS, "tracking.wandb=offline",
            f"training.total_steps={ENDLESS}", *settings,
        ]  # fmt: skip
        self._process: subprocess.Popen | None = None
        self._log_from = 0

    def start(self) -> None:
        """Start again; a little file for what is printed, all starts after one another."""
        self.starts += 1
        self._is_forked = self.starts % self._plain_every != 0
        python = self.preloaded.python if self._is_forked else sys.executable
        environment = {**os.environ, **self.clock.environment, "PYTHON": python, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
        with self.log_path.open("ab") as log:
            self._log_from = log.tell()
            self._process = subprocess.Popen(
                [*DIE_WITH_US, REPO / "launch" / "local.sh", "4", *self.settings],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip

    def set_clock(self, offset_s: int) -> None:
        """From now on the ranks' wall clocks are off by so much."""
        self.clock.set(offset_s)

    def has_ended(self) -> bool:
        """Whether the launcher is gone; forked ranks follow their clients a moment later."""
        launcher_is_gone = self._process is None or self._process.poll() is not None
        return launcher_is_gone and not (self._is_forked and self.preloaded.programs(PROGRAM))

    def exit_code(self) -> int | None:
        """The launcher's."""
        return self._process.poll() if self._process else None

    def log(self) -> str:
        """What this start has printed."""
        with self.log_path.open("rb") as file:
            file.seek(self._log_from)
            return file.read().decode(errors="replace")

    def ranks(self) -> list[int]:
        """Process ids of the four ranks, by rank; of those that are left."""
        assert self._process is not None
        if self._is_forked:
            return self.preloaded.programs(PROGRAM)
        return [pid for pid in children(self._process.pid) if PROGRAM.encode() in command_line(pid)]

    def kill_launcher(self) -> None:
        """SIGKILL; the ranks have asked the kernel to die with it."""
        assert self._process is not None
        ranks = self.ranks()
        self._process.kill()
        self._process.wait()
        if not wait_for(lambda: not any(map(command_line, ranks)), SLOW_S):
            raise CampaignError(f"ranks {ranks} outlive their launcher")

    def stop(self) -> None:
        """End what runs; wakes what is stopped."""
        if self._process is not None and not self.has_ended():
            self.kill_launcher()


class SlurmRun:
    """The run as a Slurm job on two of three nodes, two ranks on each; it requeues itself."""

    def __init__(self, cluster: SlurmCluster, disk: Path, data: Path, *, settings: Sequence[str] = ()) -> None:  # fmt: skip
        self.cluster, self.disk, self.run_dir = cluster, disk, disk / "disturbed"
        self.starts = 0
        self.job: Job | None = None
        self._settings = [
            "name=disturbed", f"runs_dir={disk}", f"data.path={data}", *SETTINGS, "tracking.wandb=disabled",
            f"training.total_steps={ENDLESS}", *settings,
        ]  # fmt: skip

    def start(self) -> None:
        """Submit; the job's own requeues count as starts too."""
        self.starts += 1
        options = (
            "--nodes=2", "--ntasks-per-node=2", "--exclusive=user", "--cpus-per-task=1", "--mem=1G", "--gres=none",
        )  # fmt: skip
        self.job = self.cluster.submit(
            "launch/pretrain.slurm", *self._settings, options=options, cwd=self.disk,
            env={"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def has_ended(self) -> bool:
        """Whether a person has to submit it again: no new checkpoint since the start before."""
        over = ("FAILED", "COMPLETED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.job is None or self.job.fact("JobState") in over

    def log(self) -> str:
        """All starts of the job."""
        return self.job.log() if self.job else ""

    def wait_for_requeue(self, restarts: str) -> None:
        """Until this start is over, as Slurm sees it."""
        assert self.job is not None
        job = self.job
        over = lambda: job.fact("Restarts") != restarts or self.has_ended()  # noqa: E731
        self.cluster.wait_for(over, "the end of this start", 180, job=job)

    def stop(self) -> None:
        """Cancel the job, which saves and leaves."""
        if self.job is not None and not self.has_ended():
            self.cluster.run("scancel", self.job.id)
            self.cluster.wait_for(self.has_ended, "the end of the job", 120, job=self.job)


class WallClock:
    """The wall clock of all programs that have `environment`; without a C compiler it is everybody's."""

    def __init__(self, folder: Path) -> None:
        self._file, library = folder / "clock", folder / "wall_clock.so"
        self.environment: dict[str, str] = {}
        if shutil.which("cc"):
            source = Path(__file__).with_name("wall_clock.c")
            if not library.exists():  # those who use it have it in their memory
                command = ["cc", "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"]
                subprocess.run(command, check=True)
            self.environment = {"LD_PRELOAD": str(library), "WALL_CLOCK_FILE": str(self._file)}

    def set(self, offset_s: int) -> None:
        """From now on it is off by so much; the file is in the programs' memory, and stays the same one."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(offset_s.to_bytes(8, sys.byteorder, signed=True))


def children(pid: int) -> list[int]:
    """Process ids of the children of all threads of a process, oldest first."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return sorted(
            int(word) for task in tasks for word in (task / "children").read_text().split()
        )
    except OSError:
        return []


def command_line(pid: int) -> bytes:
    """b'' of a process that is gone, or dead and not yet buried."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def signal_if_there(pid: int, number: signal.Signals) -> None:
    """Send a signal to what may have died meanwhile."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
