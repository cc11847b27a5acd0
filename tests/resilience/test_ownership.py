"""Two starts in one run folder: one trains, the other is refused; a dead owner's place is taken."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import MachineError
from pipeline.resilience import ownership
from tests.support.slurm_cluster import REPO
from tests.support.waiting import HANG_S

SILENCE_S = ownership.SILENCE_S
OWNER = """
import sys, time
from pathlib import Path
from pipeline.errors import MachineError
from pipeline.resilience import ownership
ownership.BEAT_S = 0.2
folder, node, go = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
print("is there", flush=True)
while not go.exists(): pass
try:
    with ownership.claim(folder, node=node):
        print("owns", flush=True)
        sys.stdin.read()
except MachineError as error:
    print(error, flush=True)
    sys.exit(2)
"""


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.fixture
def patient(monkeypatch):
    """Waits for the sign of life of a live owner as long as it takes, and looks often."""
    looks = SimpleNamespace(**vars(time) | {"sleep": lambda _: time.sleep(0.01)})
    monkeypatch.setattr(ownership, "time", looks)
    monkeypatch.setattr(ownership, "BEAT_S", HANG_S / 2)
    monkeypatch.setattr(ownership, "SILENCE_S", HANG_S)


@pytest.fixture
def seconds_to_claim(monkeypatch):
    """How long a claim waits, by a clock that goes on only where it waits: nobody is late on it."""
    waited = []
    passing = {"sleep": waited.append, "monotonic": lambda: sum(waited)}
    monkeypatch.setattr(ownership, "time", SimpleNamespace(**vars(time) | passing))

    def of(folder, node):
        waited.clear()
        with ownership.claim(folder, node=node):
            return sum(waited)

    return of


def start(folder, node="n1", *, go=Path("/"), **environment) -> subprocess.Popen:
    """Another process that claims the folder as soon as there is the file `go`, and stays."""
    command = [sys.executable, "-c", OWNER, str(folder), node, str(go)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, cwd=REPO, env={**os.environ, **environment}, text=True, **pipes)  # fmt: skip
    assert process.stdout.readline() == "is there\n"
    return process


@pytest.fixture
def owner(tmp_path):
    """A live owner on n1, of Slurm job 17 in its second start."""
    process = start(tmp_path, SLURM_JOB_ID="17", SLURM_RESTART_COUNT="1")
    assert process.stdout.readline() == "owns\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("node", ["n1", "n2"], ids=["same machine", "another machine"])
def test_the_second_start_is_refused_with_who_where_and_since_when(owner, tmp_path, patient, node):
    """It used to train beside the first, and each deleted the other's checkpoints."""
    with pytest.raises(MachineError) as caught:
        ownership.claim(tmp_path, node=node)
    message = str(caught.value)
    assert f"{tmp_path} is in use by process {owner.pid} on n1, Slurm job 17, since 20" in message
    assert "name=..." in message
    assert ownership.problem(tmp_path, node=node) == message
    assert len(list((tmp_path / "owner").iterdir())) == 1, "a refused start leaves no trace"


def test_of_starts_at_the_same_moment_one_owns(tmp_path):
    """Two sbatch of the same line start in the same second; the owner stays until all have spoken."""
    go = tmp_path / "go"
    starts = [start(tmp_path, f"n{n % 3}", go=go) for n in range(6)]
    go.touch()
    said = [process.stdout.readline() for process in starts]
    for process, line in zip(starts, said):
        if line == "owns\n":
            process.terminate()
        process.communicate()
    assert sorted(process.returncode for process in starts) == [-signal.SIGTERM, 2, 2, 2, 2, 2], (
        said
    )
    assert said.count("owns\n") == 1


def test_a_killed_owner_is_found_dead_at_once_on_its_machine(owner, tmp_path, seconds_to_claim):
    """The kernel knows; an automatic restart must not wait for a silence."""
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert ownership.problem(tmp_path, node="n1") is None
    assert seconds_to_claim(tmp_path, "n1") == 0


def test_a_killed_owner_elsewhere_is_dead_after_its_silence(owner, tmp_path, seconds_to_claim):
    """A power cut, a lost node, a pod that was moved: nobody is left to say so."""
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert SILENCE_S / 2 < seconds_to_claim(tmp_path, "n2") <= SILENCE_S + 1


def test_long_silence_is_seen_without_waiting(owner, tmp_path, seconds_to_claim):
    """By the clock of the file system: this machine's may be wrong."""
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    (claim,) = (tmp_path / "owner").iterdir()
    past = time.time() - 2 * SILENCE_S
    os.utime(claim, (past, past))
    assert seconds_to_claim(tmp_path, "n2") == 0


@pytest.mark.parametrize(
    "job, restart, is_free", [("17", "2", True), ("17", "1", False), ("18", "5", False)]
)
def test_a_requeued_job_takes_over_from_its_earlier_start(
    owner, tmp_path, monkeypatch, patient, job, restart, is_free
):
    """Slurm starts a job again only when it has ended, whatever its claim still says."""
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    assert (ownership.problem(tmp_path, node="n2") is None) == is_free


def test_a_released_folder_is_free(tmp_path, seconds_to_claim):
    """However the block ended; and the numbers go on, for a verdict on an old one must fail."""
    with pytest.raises(ZeroDivisionError), ownership.claim(tmp_path, node="n1"):
        1 / 0  # noqa: B018
    assert seconds_to_claim(tmp_path, "n2") == 0
    assert [path.name for path in (tmp_path / "owner").iterdir()] == ["00000002.json"]


def test_another_process_with_the_number_of_the_dead_one_is_not_it(
    owner, tmp_path, seconds_to_claim
):
    """After a reboot low numbers come again soon: here the owner's number is this live process's."""
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    (claim,) = (tmp_path / "owner").iterdir()
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"pid": os.getpid()}))
    assert seconds_to_claim(tmp_path, "n1") == 0


def test_an_owner_that_slept_through_its_silence_ends_when_it_wakes(
    owner, tmp_path, seconds_to_claim
):
    """Stopped, or cut off from the disk: it must not write into what is another's by then."""
    owner.send_signal(signal.SIGSTOP)
    with ownership.claim(tmp_path, node="n2"):
        owner.send_signal(signal.SIGCONT)
        assert owner.wait(timeout=HANG_S) == 2
        assert f"has been taken over by process {os.getpid()} on n2" in owner.stderr.read()


def test_a_verdict_on_an_owner_long_gone_wins_nothing(tmp_path, monkeypatch, patient):
    """B finds number 1 dead and is put to sleep; A takes number 2 and goes; C owns number 3; B wakes."""
    folder = tmp_path / "owner"
    with ownership.claim(tmp_path, node="a"):
        pass
    look, looks = ownership._owner, []

    def sleepy_look(place):
        found = look(place)
        looks.append(found[0].name if found[0] else None)
        if len(looks) == 1:  # B has seen that number 1 is free
            with monkeypatch.context() as awake:
                awake.setattr(ownership, "_owner", look)
                with ownership.claim(tmp_path, node="a"):
                    pass
                others.append(start(tmp_path, "c"))
                assert others[0].stdout.readline() == "owns\n"
            assert [path.name for path in folder.glob("*.json")] == ["00000003.json"]
        return found

    others = []
    monkeypatch.setattr(ownership, "_owner", sleepy_look)
    try:
        with pytest.raises(MachineError, match=r"process \d+ on c"):
            ownership.claim(tmp_path, node="b")
        assert [path.name for path in folder.iterdir()] == ["00000003.json"]
    finally:
        others[0].kill()
        others[0].communicate()


def test_a_claim_that_cannot_be_read_is_judged_by_its_beats(tmp_path, seconds_to_claim):
    """Half written where links are unknown, or of another release: silent, so dead."""
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "00000004.json").write_bytes(b"")
    assert SILENCE_S / 2 < seconds_to_claim(tmp_path, "n1") <= SILENCE_S + 1


def test_pids_are_compared_within_one_boot_and_container_only(
    owner, tmp_path, monkeypatch, patient
):
    """Two machines called localhost share a disk: a pid of the one says nothing on the other."""
    monkeypatch.setattr(ownership, "_machine", lambda: "another boot")
    (claim,) = (tmp_path / "owner").iterdir()
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"pid": 2**22 + 1}))
    with pytest.raises(MachineError, match="sign of life"):
        ownership.claim(tmp_path, node="n1")


def test_every_field_of_a_claim_is_read_back(tmp_path):
    with ownership.claim(tmp_path, node="n1") as mine:
        _, found = ownership._owner(tmp_path / "owner")
        assert found == mine.mine and dataclasses.is_dataclass(found)
