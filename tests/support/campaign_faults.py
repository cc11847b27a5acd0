"""The faults of a campaign, by name: how each strikes a run, what it needs, whether the start may end of it.

When a `strike` returns, the machine is whole again: what was full is empty, what was cut is joined. The run may have
ended; whoever called starts it again.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.checkpoint.folder import list_checkpoints
from tests.support import slurm_cluster
from tests.support.campaign_run import (
    ON_AGAIN_S,
    SLOW_S,
    CampaignError,
    LocalRun,
    SlurmRun,
    children,
    command_line,
    signal_if_there,
    wait_for,
)
from tests.support.log_lines import unbroken

ISOLATED = "CAMPAIGN_ISOLATED"
"""Set once this process has mounts and a network of its own."""


def kill_a_rank(run: LocalRun, dice: random.Random) -> None:
    """One rank dies; the launcher ends the others."""
    signal_if_there(dice.choice(run.ranks()), signal.SIGKILL)
    expect_the_end(run)


def kill_all_ranks(run: LocalRun, dice: random.Random) -> None:
    """As the out-of-memory killer, or a power cut, leaves them."""
    for pid in run.ranks():
        signal_if_there(pid, signal.SIGKILL)
    expect_the_end(run)


def kill_the_launcher(run: LocalRun, dice: random.Random) -> None:
    """No orphan may go on writing."""
    run.kill_launcher()


def stop_a_rank_for_a_moment(run: LocalRun, dice: random.Random) -> None:
    """A machine that swaps, a debugger: the others wait."""
    pid = dice.choice(run.ranks())
    signal_if_there(pid, signal.SIGSTOP)
    time.sleep(dice.uniform(0.5, 4.0))
    signal_if_there(pid, signal.SIGCONT)


def stop_a_rank_for_good(run: LocalRun, dice: random.Random) -> None:
    """The watchdog says who stands still, and ends the run."""
    pages = set((run.run_dir / "logs").glob("hang-*.md"))
    signal_if_there(dice.choice(run.ranks()), signal.SIGSTOP)
    expect_the_end(run)
    if not set((run.run_dir / "logs").glob("hang-*.md")) - pages:
        raise CampaignError(f"no page says which rank stood still\n{run.log()[-3000:]}")


def full_disk(run: LocalRun, dice: random.Random) -> None:
    """No byte is left on the file system of the run's folder, until a save has been given up."""
    before = saves_given_up(run)
    with filled(run.disk):
        wait_for(lambda: run.has_ended() or saves_given_up(run) > before, 60)


def read_only_folder(run: LocalRun, dice: random.Random) -> None:
    """What is open stays open, nothing can be opened for writing: a file system with errors, a server's new rule."""
    before = saves_given_up(run)
    with read_only(run.run_dir):
        wait_for(lambda: run.has_ended() or saves_given_up(run) > before, 60)


def saves_given_up(run: LocalRun) -> int:
    """How many saves of this start were."""
    return len(re.findall(r"checkpoint of step \d+ failed: .*given up", unbroken(run.log())))


def latest_is_deleted(run: LocalRun, dice: random.Random) -> None:
    """`latest` is for scripts: neither the run nor its next start may need it."""
    (run.run_dir / "checkpoints" / "latest").unlink(missing_ok=True)
    if dice.random() < 0.5:
        kill_all_ranks(run, dice)


def flip(path: Path, dice: random.Random) -> None:
    """One bit of one byte is another."""
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, dice: random.Random) -> None:
    """The file ends early."""
    os.truncate(path, dice.randrange(path.stat().st_size))


def remove(path: Path, dice: random.Random) -> None:
    """The file is gone."""
    path.unlink()


def damage(
    run: LocalRun, dice: random.Random, *, how: Callable[[Path, random.Random], None]
) -> None:
    """Kill the run and spoil a file of its newest checkpoint: the next start takes the one before."""
    folder = run.run_dir / "checkpoints"
    if not wait_for(lambda: len(list_checkpoints(folder)) > 1 or run.has_ended(), ON_AGAIN_S):
        raise CampaignError(f"{folder} gets no second checkpoint\n{run.log()[-3000:]}")
    kill_all_ranks(run, dice)
    if len(checkpoints := list_checkpoints(folder)) < 2:
        raise CampaignError(f"{folder} keeps {len(checkpoints)} checkpoints: none to go back to")
    _, newest = checkpoints[-1]
    spoilt = dice.choice(sorted(newest.iterdir()))
    how(spoilt, dice)
    run.start()
    aside = newest.with_name(f"damaged-{newest.name}")
    told = f"checkpoint {newest} is DAMAGED and not used"
    if (
        not wait_for(lambda: aside.exists() and told in unbroken(run.log()), ON_AGAIN_S)
        or run.has_ended()
    ):
        raise CampaignError(f"{how.__name__} {spoilt} was not found out\n{run.log()[-3000:]}")
    shutil.rmtree(aside)


def cut_the_link_for_a_moment(run: LocalRun, dice: random.Random) -> None:
    """A switch that starts again: TCP sends once more."""
    with cut():
        time.sleep(dice.uniform(0.5, 4.0))


def cut_the_link_for_good(run: LocalRun, dice: random.Random) -> None:
    """Nothing arrives any more, and nothing says so."""
    with cut():
        expect_the_end(run)


def clock_jump(run: LocalRun, dice: random.Random) -> None:
    """The wall clock jumps by up to a day, back or ahead, for some steps, and back."""
    run.set_clock(dice.randint(-86400, 86400))
    time.sleep(dice.uniform(0.5, 3.0))
    run.set_clock(0)


def wandb_is_killed(run: LocalRun, dice: random.Random) -> None:
    """The process that W&B starts beside rank 0 dies."""
    if "W&B is given up" in run.log():  # it was killed in this start: begin with a living one
        kill_all_ranks(run, dice)
        run.start()
    if not wait_for(lambda: wandb_processes(run), ON_AGAIN_S):
        raise CampaignError(f"W&B has no process that could be killed\n{run.log()[-3000:]}")
    for pid in wandb_processes(run):
        signal_if_there(pid, signal.SIGKILL)


def node_power_off(run: SlurmRun, dice: random.Random) -> None:
    """All processes of a node vanish at once; the job goes on, on the spare."""
    assert run.job is not None
    restarts, node = run.job.fact("Restarts"), dice.choice(run.job.nodes())
    run.cluster.power_off(node)
    run.wait_for_requeue(restarts)
    run.cluster.boot(node)


def node_is_cut_off(run: SlurmRun, dice: random.Random) -> None:
    """The ranks of a node live and hear nothing; the job goes on, on the spare."""
    assert run.job is not None
    restarts, head = run.job.fact("Restarts"), run.job.fact("BatchHost")
    node = dice.choice([node for node in run.job.nodes() if node != head])
    run.cluster.cut(node)
    run.wait_for_requeue(restarts)
    run.cluster.heal(node)
    run.cluster.boot(node)


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    strike: Callable[[Any, random.Random], None]
    ends_the_start: bool
    """Whether somebody may have to start the run again."""
    needs: Callable[[], str] = str
    """What it needs and this machine lacks; ''."""
    on_slurm: bool = False


def lacks_isolation() -> str:
    return "" if os.environ.get(ISOLATED) else "root, with mounts and a network of its own"


def lacks_compiler() -> str:
    return "" if shutil.which("cc") else "a C compiler, cc"


KINDS = {
    "kill of a rank": Kind(kill_a_rank, True),
    "kill of all ranks": Kind(kill_all_ranks, True),
    "kill of the launcher": Kind(kill_the_launcher, True),
    "rank stopped for a moment": Kind(stop_a_rank_for_a_moment, False),
    "rank stopped for good": Kind(stop_a_rank_for_good, True),
    "full disk": Kind(full_disk, False, lacks_isolation),
    "read-only folder": Kind(read_only_folder, False, lacks_isolation),
    "latest deleted": Kind(latest_is_deleted, True),
    "checkpoint file flipped": Kind(partial(damage, how=flip), True),
    "checkpoint file truncated": Kind(partial(damage, how=truncate), True),
    "checkpoint file removed": Kind(partial(damage, how=remove), True),
    "link cut for a moment": Kind(cut_the_link_for_a_moment, False, lacks_isolation),
    "link cut for good": Kind(cut_the_link_for_good, True, lacks_isolation),
    "clock jump": Kind(clock_jump, False, lacks_compiler),
    "W&B killed": Kind(wandb_is_killed, False),
    "node power-off": Kind(node_power_off, True, slurm_cluster.missing, on_slurm=True),
    "node cut off": Kind(node_is_cut_off, True, slurm_cluster.missing, on_slurm=True),
}


def expect_the_end(run: LocalRun, timeout_s: float = SLOW_S) -> None:
    """Wait for the start's end, as something has died."""
    if not wait_for(run.has_ended, timeout_s):
        raise CampaignError(f"the start does not end\n{run.log()[-3000:]}")


def wandb_processes(run: LocalRun) -> list[int]:
    """What W&B has started, under any rank."""
    return [pid for rank in run.ranks() for pid in children(rank) if b"wandb" in command_line(pid)]


@contextmanager
def filled(disk: Path) -> Any:
    """A file that takes all that is free, and again what others free."""
    filler = disk / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                pass
        yield
    finally:
        filler.unlink(missing_ok=True)


@contextmanager
def read_only(folder: Path) -> Any:
    """The folder lies under a read-only view of itself: opened files are of the view below, which stays writable."""
    command("mount", "--bind", str(folder), str(folder))
    try:
        command("mount", "-o", "remount,bind,ro", str(folder))
        yield
    finally:
        command("umount", "--lazy", str(folder))


@contextmanager
def cut() -> Any:
    """The only link of this network is down."""
    command("ip", "link", "set", "lo", "down")
    try:
        yield
    finally:
        command("ip", "link", "set", "lo", "up")


def command(*words: str) -> None:
    """Run it, or say what it said."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise CampaignError(f"{' '.join(words)}: {done.stderr.strip()}")
