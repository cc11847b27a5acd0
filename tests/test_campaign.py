"""The campaign itself: its list is that of its seed, a trace is found, and a short slice of it is survived."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import campaign
from tests.support import slurm_cluster
from tests.support.campaign_faults import KINDS
from tests.support.campaign_ledger import Ledger
from tests.support.campaign_run import CampaignError, Progress, wait_for
from tests.support.preloaded import Preloaded
from tests.support.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[1]


def row(step: int, **changes: object) -> dict:
    return {"step": step, "train/loss": 1.0 / step, "train/grad_norm": 0.5, "train/lr": 0.1, "data/sample_hash": f"{step:x}", "tokens": step, **changes}  # fmt: skip


def test_a_seed_has_one_list_in_which_no_kind_is_rare() -> None:
    """A fault that was not survived can be struck again."""
    drawn = campaign.draw(7, 3 * len(KINDS), list(KINDS))
    assert drawn == campaign.draw(7, 3 * len(KINDS), list(KINDS))
    assert drawn != campaign.draw(8, 3 * len(KINDS), list(KINDS))
    assert drawn[:5] == campaign.draw(7, 5, list(KINDS))
    for first in range(0, len(drawn), len(KINDS)):
        assert {fault.kind for fault in drawn[first : first + len(KINDS)]} == set(KINDS)


def test_a_lost_step_and_another_number_are_traces() -> None:
    """Steps done twice count twice: the lost half of a step may be right the second time."""
    whole = [row(step) for step in (1, 2, 3)]
    assert campaign.differences([*whole[:2], *whole[1:]], whole, 3) == []
    assert campaign.differences([whole[0], whole[2]], whole, 3) == ["step 2 was never logged"]
    for key in campaign.NUMBERS:
        (found,) = campaign.differences([*whole, row(2, **{key: 0.25})], whole, 3)
        assert found.startswith("step 2: ")


class Dead:
    """A run whose every start ends at once."""

    starts = 0

    def start(self) -> None:
        self.starts += 1

    def has_ended(self) -> bool:
        return True

    def log(self) -> str:
        return "it says why"


def test_a_run_that_does_not_go_on_ends_the_campaign(tmp_path: Path) -> None:
    """Starting it again for ever would hide a run that each fault ends."""
    run = Dead()
    with pytest.raises(CampaignError, match="ended at step 0\nit says why"):
        campaign.advance(run, Progress(tmp_path), to=1, max_starts=2)  # type: ignore[arg-type]
    assert run.starts == 2


def test_half_a_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    """The run writes while the campaign reads, and a killed one leaves half a line."""
    progress = Progress(tmp_path)
    assert progress.read() == 0
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step":1,"train/loss":2}\n{"step":2,"train/l')
    assert progress.read() == 1
    with file.open("a") as lines:
        lines.write('\n{"step":2,"train/loss":1}\n')
    assert progress.read() == 2
    assert [r["step"] for r in progress.rows] == [1, 2]


def test_faults_add_up_over_campaigns_and_count_when_they_are_compared(tmp_path: Path) -> None:
    """A campaign of hours is cut off sooner or later; what it has compared is not struck again, and nothing else counts."""
    ledger = Ledger(tmp_path / "report.jsonl")
    cost = {"step": 9, "starts": 1, "seconds": 2.0}
    for number, kind in enumerate(("full disk", "W&B killed", "clock jump"), start=1):
        ledger.add(seed=1, fault=number, kind=kind, **cost)
        if number == 2:
            ledger.add(seed=1, equal=[1, 2], last=20)
    with ledger.path.open("a") as file:
        file.write('{"seed": 1, "equal": [3')  # killed here
    assert ledger.done(1) == {(1, "full disk"), (2, "W&B killed")}
    ledger.path.write_text(ledger.path.read_text().rpartition("\n")[0] + "\n")
    ledger.add(seed=1, fault=3, kind="clock jump", **cost)
    ledger.add(seed=1, equal=[3], last=30)
    ledger.add(seed=2, fault=1, kind="full disk", **{**cost, "seconds": 8.0})
    ledger.add(seed=2, equal=[1], last=10)
    ledger.add(seed=2, lost="fault 2, clock jump, at step 7: it ended\nand its log")
    text = ledger.report(list(KINDS), {"node power-off": "slurmd"}, "two cores")
    assert text.startswith("4 faults survived (seed 1, 2) by 3 runs in 60 steps and 4 starts")
    assert "LOST: fault 2, clock jump, at step 7: it ended\n" in text and "its log" not in text
    assert (
        "| full disk | 2 | 2 | 8.0, 8.0 |" in text and "| clock jump | 1 | 1 | 2.0, 2.0 |" in text
    )
    assert "| node power-off | skipped: needs slurmd | | |" in text


PROBE = """
import os, signal, sys, time
print(sys.argv[1:], os.environ["WORD"], os.getcwd(), __name__, signal.getsignal(signal.SIGHUP).name, flush=True)
print("said", file=sys.stderr)
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(7))
print(os.getpid(), flush=True)
if sys.argv[1] == "end":
    sys.stdin.read()
while sys.argv[1] == "wait":  # a signal just before a long sleep would be heard after it
    time.sleep(0.02)
os.kill(os.getpid(), int(sys.argv[2]))
"""


def test_a_forked_program_is_the_one_that_python_would_have_started(tmp_path: Path) -> None:
    """Words, environment, folder, streams, ignored signals, notices, exit codes and ends: or the campaign is of another program."""
    (tmp_path / "probe_of_campaign.py").write_text(PROBE)

    def start(python: list[str], *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["nohup", *python, "-m", "probe_of_campaign", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, cwd=tmp_path, env={**os.environ, "WORD": "a word"},
        )  # fmt: skip

    with Preloaded(tmp_path, modules=["json"]) as preloaded:
        pythons = (preloaded.python.split(), [sys.executable])
        plain, forked = [], []
        for python, seen in zip(pythons, (forked, plain), strict=True):
            for number in (signal.SIGKILL, signal.SIGTERM):
                ended = start(python, "end", str(int(number)))
                out, err = ended.communicate("")
                assert out and err.endswith("said\n"), f"{ended.returncode}: {out!r}, {err!r}"
                seen += [out.splitlines()[0], ended.returncode]
            told = start(python, "wait")
            assert told.stdout
            seen.append(told.stdout.readline())
            told.stdout.readline()  # from here on it hears
            told.send_signal(signal.SIGUSR2)
            seen.append(told.wait(HANG_S))
            told.communicate()
        assert forked == plain
        assert "['wait'] a word" in plain[-2] and plain[1] == -signal.SIGKILL and plain[-1] == 7

        killed = start(pythons[0], "wait")
        assert killed.stdout
        killed.stdout.readline()
        pid = int(killed.stdout.readline())
        assert preloaded.programs("probe_of_campaign") == [pid]
        os.kill(pid, signal.SIGSTOP)  # what is stopped dies with its client all the same
        killed.kill()
        killed.communicate()
        assert wait_for(lambda: not preloaded.programs("probe_of_campaign"), HANG_S)


def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """A pytest that was killed left one with all libraries behind."""
    program = f"""
import time
from pathlib import Path
from tests.support.preloaded import Preloaded
with Preloaded(Path({str(tmp_path)!r}), modules=["json"]) as server:
    print(server._process.pid, flush=True)
    time.sleep({HANG_S})
"""
    starter = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout
    server = Path(f"/proc/{int(starter.stdout.readline())}")
    assert "preloaded.socket" in (server / "cmdline").read_text()
    starter.kill()
    starter.communicate()
    assert wait_for(lambda: not server.exists(), HANG_S)


@pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or "namespaces")
def test_a_forked_program_is_where_its_client_is_and_ends_with_it(tmp_path: Path) -> None:
    """A node of the test Slurm has a host name, a network and processes of its own, and is switched off."""
    where = "for kind in pid mnt uts ipc net; do readlink /proc/self/ns/$kind; done"
    (tmp_path / "probe_of_campaign.py").write_text(
        f"import subprocess, sys; subprocess.run([*'sh -c'.split(), {where!r}]); sys.stdin.read()\n"
    )
    node = "unshare --mount --uts --ipc --net --pid --fork --kill-child=KILL --mount-proc sh -c".split()
    with Preloaded(tmp_path, modules=["json"]) as preloaded:
        within = f"{where}; {preloaded.python} -m probe_of_campaign"
        started = subprocess.Popen(
            [*node, within], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
        )
        assert started.stdout
        lines = [started.stdout.readline() for _ in range(10)]
        assert lines[:5] == lines[5:]
        ours = [
            f"{os.readlink(f'/proc/self/ns/{kind}')}\n"
            for kind in ("pid", "mnt", "uts", "ipc", "net")
        ]
        assert [line for line in lines if line in ours or not line] == []
        assert len(preloaded.programs("probe_of_campaign")) == 1
        started.kill()
        started.communicate()
        assert wait_for(lambda: not preloaded.programs("probe_of_campaign"), HANG_S)


@pytest.mark.slow
def test_a_slice_of_the_campaign_is_survived(tmp_path: Path) -> None:
    """Cheap kinds; `make soak` takes all of them for hours."""
    kinds = "kill of a rank,link cut for a moment,clock jump,checkpoint file flipped"
    words = ["--faults", "4", "--seed", "2", "--kinds", kinds, "--folder", str(tmp_path / "c")]
    command = [sys.executable, "-m", "tests.campaign", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 faults survived (seed 2)" in done.stdout
