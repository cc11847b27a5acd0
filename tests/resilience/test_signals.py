"""A notice is heard at any time and does no harm twice."""

import signal
import subprocess
import sys

import pytest

from tests.support.slurm_cluster import REPO
from tests.support.waiting import HANG_S

PROGRAM = """
import signal, sys
from pipeline.resilience import notice as notices
notices.install_handlers()
assert "torch" not in sys.modules
print("ready", flush=True)
while (notice := notices.received()) is None: signal.sigtimedwait([], 0.01)
print(notice.name, flush=True)
sys.stdin.read()  # a second signal arrives here
print(notices.received().name)
"""


@pytest.mark.parametrize("second", [signal.SIGUSR2, signal.SIGTERM])
@pytest.mark.parametrize("first", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_notice_does_no_harm(first, second):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(first)
    assert process.stdout.readline() == f"{first.name}\n"
    process.send_signal(second)
    output, _ = process.communicate("", timeout=HANG_S)
    assert (process.returncode, output) == (0, f"{first.name}\n")


def test_a_notice_before_the_handlers_waits_for_them():
    """The launch script starts ranks with the signals blocked: one that comes while Python starts is not lost."""
    told = ["sh", "-c", 'kill -USR2 $$; exec "$0" -c "$1"', sys.executable, PROGRAM]
    command = ["env", "--block-signal=USR2,TERM", *told]
    done = subprocess.run(
        command, cwd=REPO, input="", capture_output=True, text=True, timeout=HANG_S
    )
    assert (done.returncode, done.stdout) == (0, "ready\nSIGUSR2\nSIGUSR2\n")


def test_a_hangup_that_is_ignored_from_the_start_stays_ignored():
    """`nohup` means: go on when the terminal goes."""
    hang_up = ["sh", "-c", 'trap "" HUP; exec "$0" -c "$1"', sys.executable, PROGRAM]
    process = subprocess.Popen(hang_up, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR2)
    assert process.communicate("", timeout=HANG_S)[0] == "SIGUSR2\nSIGUSR2\n"


def test_a_second_interrupt_ends_the_process():
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate("", timeout=HANG_S)
    assert process.returncode == 130
    heard, _, left = [line for line in errors.splitlines() if line]  # and no stack
    assert heard.startswith("Ctrl-C heard: the run saves after this step") and "at once" in left
