"""A test Slurm, a dataset, and an undisturbed run that every run under launch/pretrain.slurm is compared with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.checkpoint import folder as folders
from pipeline.tracking.row_file import read_rows
from tests.support.plant import Lead
from tests.support.preloaded import Preloaded
from tests.support.slurm_cluster import REPO, Job, SlurmCluster, missing
from tests.support.token_dataset import write_dataset
from tests.support.waiting import HANG_S

NEEDS_SLURM = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=missing() or "a cluster can start"),
]
STEPS, SAVE_EVERY = 40, 10
SETTINGS = [
    "data.validation=[]", "model.num_layers=2", "model.hidden_size=32", "model.max_seq_len=32",
    "schedule.warmup_steps=2",
    f"training.total_steps={STEPS}", "training.global_batch_size=8", "training.micro_batch_size=2",
    "training.precision=fp32", "tracking.log_every=1", "tracking.sample_hash=true", "tracking.wandb=offline",
    f"checkpoint.save_every={SAVE_EVERY}", "optimizer.lr=0.003",
]  # fmt: skip


class Lab:
    """A cluster, a dataset, and what an undisturbed process makes of it."""

    def __init__(self, cluster: SlurmCluster, folder: Path, server: Preloaded) -> None:
        self.cluster, self.folder, self._server = cluster, folder, server
        self.plain_python = self.python = f"{sys.executable} {REPO}/tests/support/plant.py"
        rng = np.random.default_rng(0)
        # Each token is one of four that may follow the one before: there is something to learn.
        steps = rng.integers(0, 4, 8192)
        tokens = np.cumsum(steps * 5 + 1) % 64
        write_dataset(
            folder / "data" / "train", np.split(tokens, 2), block_tokens=1024, vocab_size=64
        )
        self.settings = [f"data.path={folder / 'data'}", *SETTINGS]
        environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        command = [
            *server.python.split(),
            "-m",
            "pipeline.train",
            "name=alone",
            *self.settings,
            "tracking.wandb=disabled",
        ]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANG_S
        )
        assert done.returncode == 0, done.stderr
        self.alone = self.rows("alone")
        assert [row["step"] for row in self.alone] == list(range(1, STEPS + 1))

    def preload(self) -> None:
        """Fork what later jobs run from a process that has the libraries: 6 s of CPU less a rank.

        A rank may stop itself; a test that looks for its process finds tests.support.preloaded_client.
        """
        self.python = f"{self._server.python} -m tests.support.plant"

    def submit(
        self,
        name: str,
        *settings: str,
        options: tuple[str, ...] = ("--nodes=2",),
        plant: str = "",
        until: int = STEPS,
    ) -> Job:
        """The job of a run that stands still after step `until`, until lead() lets it go on."""
        environment = {
            "PYTHON": self.python,
            "PLANT": f"{plant} {Lead(self._until(name), to=until).plant}",
            "OMP_NUM_THREADS": "1",
        }
        # Jobs of several tests share the nodes.
        options = ("--exclusive=user", "--cpus-per-task=1", "--mem=1G", "--gres=none", *options)
        arguments = [f"name={name}", *self.settings, *settings]
        return self.cluster.submit(
            "launch/pretrain.slurm", *arguments, options=options, env=environment, cwd=self.folder
        )

    def lead(self, name: str, *, to: int = STEPS) -> None:
        """Let the run of that name go on to this step."""
        Lead(self._until(name), to=to)

    def _until(self, name: str) -> Path:
        return self.folder / f"{name}.until"

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def rows(self, name: str) -> list[dict]:
        """The logged steps, in the order they were done; a line that is being written is none yet."""
        path = self.run_dir(name) / "metrics.jsonl"
        return [row for row in read_rows(path) if "train/loss" in row] if path.exists() else []

    def wait_for_step(self, job: Job, name: str, step: int) -> None:
        """Until the step is logged, and the checkpoint before it is on the disk: the run would go on there."""
        due = folders.name_of(step // SAVE_EVERY * SAVE_EVERY)
        latest = self.run_dir(name) / "checkpoints" / folders.LATEST

        def reached() -> bool:
            if max((row["step"] for row in self.rows(name)), default=0) >= step and (
                step < SAVE_EVERY or (latest.exists() and latest.read_text().strip() >= due)
            ):
                return True
            assert job.fact("JobState") not in ("FAILED", "COMPLETED", "CANCELLED"), job.log()
            return False

        self.cluster.wait_for(reached, f"step {step}", HANG_S, job=job)

    def expect_undisturbed(self, name: str, *, repeated: bool = False) -> None:
        """Every step once (or, after a crash, again with the same result), as the lone process did it."""
        rows = self.rows(name)
        if not repeated:
            assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
            # Only a killed process may leave half a line.
            written = (self.run_dir(name) / "metrics.jsonl").read_text().splitlines()
            assert all(json.loads(line) for line in written)
        assert {row["step"] for row in rows} == set(range(1, STEPS + 1))
        for row in rows:
            expected = self.alone[row["step"] - 1]
            assert row["data/sample_hash"] == expected["data/sample_hash"], row
            assert row["train/loss"] == pytest.approx(expected["train/loss"], abs=2e-5), row
            assert row["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-3), (
                row
            )

    def expect_one_wandb_run(self, name: str, *, starts: int) -> None:
        folders = [path.name for path in (self.run_dir(name) / "wandb").glob("offline-run-*")]
        # Slurm's TERM also ends W&B's own process, which is then started again: a folder more.
        assert len(folders) >= starts
        assert len({folder.rpartition("-")[2] for folder in folders}) == 1
