"""A real Slurm cluster on this machine, for tests marked `slurm`; tests/support/slurmbox is what runs inside.

    with SlurmCluster(tmp_path / "box", num_nodes=3) as cluster:
        job = cluster.submit("launch/pretrain.slurm", "name=a", options=["--nodes=2"], env={...})
        cluster.wait_for(lambda: "step 5" in job.log(), "step 5")
        cluster.power_off("n2")

Each node has its own processes, network address, host name and shared memory, so a node can be switched off and a
link cut. Needs root, slurm-wlm, munge, iproute2, util-linux; `missing()` says what is not here. One SIGKILL removes
everything, also when the test process itself is killed. Every client call has a time limit.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.waiting import HANG_S

BOX = Path(__file__).with_name("slurmbox")
REPO = Path(__file__).resolve().parents[2]

SLURM_CONF = """\
ClusterName=box
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Seconds a launch credential lives; a requeued job is held as long (default 120).
AuthInfo=cred_expire={requeue_hold_s}
CredType=cred/munge
StateSaveLocation={dir}/state
SlurmctldPidFile=/run/slurmctld.pid
SlurmctldLogFile={dir}/log/ctl.log
SlurmdSpoolDir={dir}/%n.spool
SlurmdPidFile=/run/slurmd.pid
SlurmdLogFile={dir}/log/%n.log
# No cgroup, affinity or MPI plugin: nothing that depends on this machine.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
# A lost node is noticed in seconds (in production: 300).
SlurmdTimeout={slurmd_timeout_s}
SlurmctldTimeout=10
# A signal that a node is slow to answer is sent again a minute later. In production a requeued job is held for longer
# than that; here such a signal would end the job's next start. A step's end is answered when it has ended, as late as
# KillWait after the signal.
MessageTimeout={message_timeout_s}
TCPTimeout=2
InactiveLimit=0
KillWait={kill_wait_s}
UnkillableStepTimeout=15
BatchStartTimeout=10
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace_s}
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """What a cluster needs and this machine lacks, or '' when a cluster can start."""
    if os.geteuid() != 0:
        return "a Slurm cluster in namespaces needs root"
    tools = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "setpriv")
    absent = [tool for tool in tools if not shutil.which(tool)]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge iproute2)"
    probe = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "true"], capture_output=True
    )
    return "" if probe.returncode == 0 else "this container may not create namespaces"


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    cluster: SlurmCluster
    id: str
    log_path: Path

    def log(self) -> str:
        """All the job has printed so far, all runs of it."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def fact(self, name: str) -> str:
        """A field of `scontrol show job`, e.g. JobState, Restarts, NodeList, BatchHost, ExitCode."""
        text = self.cluster.run("scontrol", "-o", "show", "job", self.id)
        return dict(word.partition("=")[::2] for word in text.split())[name]

    def nodes(self) -> list[str]:
        """Names of the nodes the job runs on."""
        return self.cluster.run("scontrol", "show", "hostnames", self.fact("NodeList")).split()

    def wait_for_end(self, timeout_s: float = HANG_S) -> str:
        """The final state: COMPLETED, FAILED, CANCELLED, TIMEOUT, ..."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL"}
        self.cluster.wait_for(
            lambda: self.fact("JobState") in over, "the job's end", timeout_s, job=self
        )
        return self.fact("JobState")


class SlurmCluster:
    """Controller `ctl` and nodes `n1`..`nN`; a context manager."""

    def __init__(
        self, folder: Path, *, num_nodes: int, cpus_per_node: int = 8, kill_wait_s: int = 5, grace_s: int = 20,
        requeue_hold_s: int = 5, slurmd_timeout_s: int = 8,
    ) -> None:  # fmt: skip
        self.folder, self.num_nodes = folder, num_nodes
        for name in ("etc", "state", "log"):
            (folder / name).mkdir(parents=True)
        (folder / "munge.key").touch(mode=0o600)
        (folder / "munge.key").write_bytes(os.urandom(128))
        nodes = range(1, num_nodes + 1)
        hosts = ["127.0.0.1 localhost", "10.77.0.1 ctl", *(f"10.77.0.{10 + i} n{i}" for i in nodes)]
        (folder / "hosts").write_text("\n".join(hosts) + "\n")
        # No DNS: names resolve at once or not at all.
        (folder / "nsswitch").write_text("passwd: files\ngroup: files\nhosts: files\n")
        conf = SLURM_CONF.format(
            dir=folder, kill_wait_s=kill_wait_s, grace_s=grace_s, requeue_hold_s=requeue_hold_s,
            slurmd_timeout_s=slurmd_timeout_s, message_timeout_s=kill_wait_s + 20,
        )  # fmt: skip
        lines = "".join(
            f"NodeName=n{i} CPUs={cpus_per_node} RealMemory=8000 State=UNKNOWN\n" for i in nodes
        )
        (folder / "etc" / "slurm.conf").write_text(
            conf.replace("PartitionName=main", lines + "PartitionName=main")
        )

    def __enter__(self) -> SlurmCluster:
        # setpriv: the cluster dies with this process. unshare --kill-child: its pid 1 dies with unshare.
        isolate = (
            "unshare --mount --uts --ipc --net --pid --fork --kill-child=KILL --mount-proc".split()
        )
        with (self.folder / "log" / "box.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *isolate, BOX, "controller", self.folder, str(self.num_nodes)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            self.wait_for(lambda: self._idle() == self.num_nodes, f"{self.num_nodes} idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children():  # pid 1 of the cluster: the kernel kills all that is in it
            os.kill(int(child), signal.SIGKILL)
        try:
            self._process.wait(timeout=HANG_S)
        finally:
            self._process.kill()

    def run(
        self, *command: str, node: str | None = None, env: Mapping[str, str] | None = None, cwd: Path | None = None,
        timeout_s: float = HANG_S,
    ) -> str:  # fmt: skip
        """What a command prints on the controller (or on `node`); AssertionError when it fails."""
        done = subprocess.run(
            [*self._enter(node), "/bin/sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", cwd or self.folder, *command],
            capture_output=True, text=True, timeout=timeout_s, env={**os.environ, **(env or {})},
        )  # fmt: skip
        assert done.returncode == 0, (
            f"{' '.join(command)}: rc {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout

    def submit(
        self, script: str, *arguments: str, options: Sequence[str] = (), env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Job:  # fmt: skip
        """sbatch `script` (relative to the repository) with `arguments`."""
        log = self.folder / "log" / "job-%j.out"
        command = [
            "sbatch",
            "--parsable",
            f"--output={log}",
            *options,
            str(REPO / script),
            *arguments,
        ]
        job_id = self.run(*command, env=env, cwd=cwd).strip()
        return Job(self, job_id, Path(str(log).replace("%j", job_id)))

    def wait_for(
        self,
        claim: Callable[[], bool],
        what: str,
        timeout_s: float = HANG_S,
        *,
        job: Job | None = None,
    ) -> None:
        """Return once `claim()` holds; fail with the job's log (or the cluster's) after timeout_s."""
        deadline = time.monotonic() + timeout_s
        while not claim():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"no {what} within {timeout_s:.0f} s\n{job.log() if job else self._logs()}"
                )
            time.sleep(0.2)

    def cut(self, node: str) -> None:
        """Take the node's network link down."""
        self.run("ip", "link", "set", f"v{node}", "down")

    def heal(self, node: str) -> None:
        """Bring the node's network link up again."""
        self.run("ip", "link", "set", f"v{node}", "up")

    def power_off(self, node: str) -> None:
        """All processes of the node vanish at once; they are gone when this returns."""
        self.cut(node)
        self.run("kill", "-9", (self.folder / f"{node}.pid").read_text().strip())
        self.wait_for(lambda: self._is_off(node), f"end of {node}")

    def boot(self, node: str) -> None:
        """Start a node that is off, or undrain one that Slurm has drained, and wait until it is idle."""
        if self._is_off(node):
            self.run(str(BOX), "boot", str(self.folder), node)

        def idle() -> bool:
            state = self.run("sinfo", "-h", "-N", "-n", node, "-p", "main", "-o", "%T").strip()
            if state.startswith("drain"):  # "Kill task failed" is sticky
                self.run("scontrol", "update", f"nodename={node}", "state=resume")
            return state == "idle"

        self.wait_for(idle, f"idle {node}")

    def reset(self) -> None:
        """No jobs, all links up, all nodes idle: whatever the test before left behind."""
        self.run("scancel", "--user=root")
        for number in range(1, self.num_nodes + 1):
            node = f"n{number}"
            # Steps that Slurm has given up may live there still: it would end them once it hears of
            # them, and if they take long it drains the node in the midst of the next test.
            if not self._is_off(node) and self._is_cut(node):
                self.power_off(node)
            self.boot(node)

    def tasks(self, job: Job, node: str) -> list[str]:
        """Process ids (as the node sees them) of the job's ranks on a node."""
        listing = self.run("scontrol", "listpids", job.id, node=node)
        rows = [line.split() for line in listing.splitlines()[1:]]
        return [row[0] for row in rows if row[2] != "batch" and row[4].isdigit()]

    def _is_off(self, node: str) -> bool:
        pid = (self.folder / f"{node}.pid").read_text().strip()
        return "gone" in self.run("sh", "-c", f"kill -0 {pid} 2>/dev/null || echo gone")

    def _is_cut(self, node: str) -> bool:
        return "state DOWN" in self.run("ip", "link", "show", f"v{node}")

    def _enter(self, node: str | None) -> list[str]:
        children = self._children()
        assert children, f"the cluster is not running:\n{self._logs()}"
        enter = "nsenter -m -u -i -n -p -t".split()
        inner = [*enter, (self.folder / f"{node}.pid").read_text().strip(), "--"] if node else []
        return [*enter, children[0], "--", *inner]

    def _children(self) -> list[str]:
        return (
            Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        )

    def _idle(self) -> int:
        if self._process.poll() is not None:
            raise AssertionError(f"the cluster did not start:\n{self._logs()}")
        try:
            return int(self.run("sinfo", "-h", "-t", "idle", "-p", "main", "-o", "%D").strip() or 0)
        except AssertionError:  # slurmctld is not there yet
            return 0

    def _logs(self) -> str:
        logs = sorted((self.folder / "log").glob("*"))
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in logs
        )
