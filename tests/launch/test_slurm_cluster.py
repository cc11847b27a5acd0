"""The cluster recipe itself: it comes up, breaks the way machines break, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.slurm_cluster import REPO, SlurmCluster
from tests.support.slurm_lab import NEEDS_SLURM
from tests.support.waiting import HANG_S

pytestmark = NEEDS_SLURM


def processes_mentioning(text: str) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_text()
        except (OSError, ValueError):
            continue
        if folder.name.isdigit() and int(folder.name) != os.getpid() and text in command:
            found.append(command.replace("\0", " "))
    return found


def test_nodes_are_machines_of_their_own(tmp_path):
    """A job array spreads over the nodes; a cut or switched-off node is unreachable and comes back."""
    script = tmp_path / "where.sh"
    script.write_text("#!/bin/bash\nhostname\n")
    with SlurmCluster(tmp_path / "box", num_nodes=3, cpus_per_node=2) as cluster:
        options = ["--array=0-5", "--cpus-per-task=1", f"--output={tmp_path}/out-%a"]
        cluster.run("sbatch", *options, str(script))
        outputs = [tmp_path / f"out-{i}" for i in range(6)]
        cluster.wait_for(lambda: all(p.exists() and p.read_text() for p in outputs), "six outputs")
        assert {p.read_text().strip() for p in outputs} == {"n1", "n2", "n3"}

        reach = ["timeout", "2", "bash", "-c", "</dev/tcp/n3/6818"]
        cluster.run(*reach)
        cluster.cut("n3")
        with pytest.raises(AssertionError):
            cluster.run(*reach)
        cluster.heal("n3")
        cluster.run("timeout", "5", "bash", "-c", "</dev/tcp/n3/6818")

        cluster.power_off("n2")
        with pytest.raises(AssertionError):
            cluster.run("timeout", "2", "bash", "-c", "</dev/tcp/n2/6818")
        cluster.boot("n2")
        assert cluster.run("srun", "--nodelist=n2", "hostname").strip() == "n2"
    assert processes_mentioning(str(tmp_path)) == []


def test_cluster_dies_with_the_process_that_started_it(tmp_path):
    """kill -9 of the tests leaves no daemon behind."""
    program = (
        "import sys, time; from pathlib import Path; from tests.support.slurm_cluster import SlurmCluster\n"
        f"with SlurmCluster(Path({str(tmp_path / 'box')!r}), num_nodes=1): print('up', flush=True); time.sleep(60)\n"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None and starter.stdout.readline() == "up\n"
    assert processes_mentioning(str(tmp_path / "box"))
    starter.send_signal(signal.SIGKILL)
    starter.communicate()
    deadline = time.monotonic() + HANG_S
    while processes_mentioning(str(tmp_path / "box")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_mentioning(str(tmp_path / "box")) == []
