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


def test_a_node_that_takes_long_to_end_is_booted_all_the_same(tmp_path):
    """It was still there when boot looked, was taken for one that runs, and stayed off for good."""
    with SlurmCluster(tmp_path / "box", num_nodes=1) as cluster:
        # Killed, a node is there until the process that started it takes notice: 2 s from now.
        node = (tmp_path / "box" / "n1.pid").read_text().strip()
        starter = cluster.run("ps", "-o", "ppid=", node).strip()
        late = f"kill -STOP {starter}; (sleep 2; kill -CONT {starter}) >/dev/null 2>&1 &"
        cluster.run("sh", "-c", late)
        cluster.power_off("n1")
        cluster.boot("n1")
        assert cluster.run("srun", "hostname").strip() == "n1"


@pytest.mark.slow
def test_nothing_lives_on_a_node_that_was_cut_when_the_next_test_begins(tmp_path):
    """A step there outlived its job; Slurm drained the node while the next test ran ("Kill task failed")."""
    script, at_work = tmp_path / "stubborn.sh", tmp_path / "at-work"
    script.write_text(f"""#!/bin/bash
srun bash -c 'trap "" TERM; echo $(hostname) >> {at_work}; while :; do sleep 1; done'
""")
    with SlurmCluster(tmp_path / "box", num_nodes=2) as cluster:
        cluster.run("sbatch", "--nodes=2", "--no-requeue", f"--output={tmp_path}/out", str(script))
        cluster.wait_for(
            lambda: at_work.exists() and len(at_work.read_text().split()) == 2, "two tasks"
        )
        cluster.cut("n2")
        cluster.wait_for(lambda: not cluster.run("squeue", "-h"), "the end of the job")
        cluster.reset()
        listing = cluster.run("ps", "-e", "-o", "comm=", node="n2").split()
        assert "slurmd" in listing and "slurmstepd" not in listing, listing
        assert cluster.run("srun", "--nodelist=n2", "hostname").strip() == "n2"


@pytest.mark.slow
def test_a_signal_to_a_slow_node_does_not_reach_the_jobs_next_start(tmp_path):
    """Slurm sends a signal that was not answered in MessageTimeout again after 60 s; the start that is meant is over.

    Slow twice over: the node is stopped, and a task ignores the signal until KillWait is over.
    """
    script, is_stopped = tmp_path / "again.sh", tmp_path / "stopped"
    script.write_text("""#!/bin/bash
srun --kill-on-bad-exit=1 bash -c '
  [[ $SLURM_RESTART_COUNT == 0 ]] && trap "" TERM || trap "echo heard in $SLURM_RESTART_COUNT; exit 0" TERM
  echo start $SLURM_RESTART_COUNT on $(hostname)
  while :; do
    [[ $SLURM_RESTART_COUNT == 0 && $(hostname) == n1 && -e $IS_STOPPED ]] && exit 1
    sleep 0.1
  done'
scontrol requeue $SLURM_JOB_ID && sleep 60
""")
    with SlurmCluster(tmp_path / "box", num_nodes=2, kill_wait_s=20) as cluster:
        said = tmp_path / "said"
        # Slurm sets the count from the second start on.
        environment = {"SLURM_RESTART_COUNT": "0", "IS_STOPPED": str(is_stopped)}
        options = ["--nodes=2", "--requeue", "--open-mode=append", f"--output={said}"]
        cluster.run("sbatch", *options, str(script), env=environment)
        cluster.wait_for(lambda: said.exists() and said.read_text().count("start 0") == 2, "start")
        cluster.run("pkill", "-STOP", "slurmd", node="n2")
        is_stopped.touch()
        cluster.wait_for(lambda: "exit code 1" in said.read_text(), "the end of a rank")
        time.sleep(6)
        cluster.run("pkill", "-CONT", "slurmd", node="n2")
        cluster.wait_for(lambda: said.read_text().count("start 1") == 2, "the next start")
        time.sleep(65)
        assert "heard in 1" not in said.read_text(), said.read_text()


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
