"""Strike runs with faults drawn from a seeded list; each must end as if nothing had happened.

    python -m tests.campaign --faults 300 --seed 1 --report report.md     make soak; cut off, the same words go on
    python -m tests.campaign --faults 4 --kinds "full disk,W&B killed"    those alone

Four ranks, TP2 x PP2, asynchronous saves. A fault strikes at a random moment, some steps after the run has gone further
than ever; then the run must go on, started again by hand only where the kind allows it. After each round of faults the
run gets a last step, an undisturbed one does as many, and every logged step (also those done twice), the samples, and
all tensors of the last checkpoint must be the same, bit by bit; then another run begins. The report counts the faults
of compared runs, of all campaigns that have written to it (beside it, report.jsonl). Kinds that this machine cannot do
are skipped by name. As root it has mounts and a network of its own, which end with it. Starts are forked
from a process that has imported what a rank needs, but for one of --plain-every. The first fault that is not survived ends the campaign.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint import folder as checkpoints
from tests.support import campaign_faults as faults
from tests.support.campaign_faults import ISOLATED, KINDS, command
from tests.support.campaign_ledger import Ledger
from tests.support.campaign_run import (
    ON_AGAIN_S,
    CampaignError,
    LocalRun,
    Progress,
    Run,
    SlurmRun,
    WallClock,
    wait_for,
    write_data,
)
from tests.support.preloaded import Preloaded
from tests.support.slurm_cluster import SlurmCluster

DISK_SIZE = "size=192m"  # room for checkpoints of 1 MB; a save wants 64 MiB to be free
LAST_STEPS = 6
NUMBERS = ("train/loss", "train/grad_norm", "train/lr", "data/sample_hash", "tokens")
UNDISTURBED = "undisturbed"


@dataclass(frozen=True)
class Fault:
    """What strikes, and when."""

    number: int
    kind: str
    after_steps: int
    """Steps beyond the highest one before it."""
    delay_s: float
    """Then so much later: at any moment of a step."""
    seed: int
    """Which rank, which file, how long."""


@dataclass(frozen=True)
class Site:
    """Where a campaign takes place."""

    folder: Path
    seed: int
    ledger: Ledger
    plain_every: int
    """Starts of which one imports all itself."""

    @property
    def disk(self) -> Path:
        """Where runs lie: a small file system of its own, if we are root."""
        return self.folder / "disk"

    def run(self, preloaded: Preloaded, *settings: str, name: str = "disturbed") -> LocalRun:
        """A run under launch/local.sh."""
        return LocalRun(
            self.disk, self.folder / "data", preloaded=preloaded, plain_every=self.plain_every, name=name, settings=settings,
        )  # fmt: skip


def draw(seed: int, count: int, kinds: Sequence[str]) -> list[Fault]:
    """The list of a seed: all kinds in an order drawn anew for each round, so that none is rare."""
    dice, drawn = random.Random(seed), []
    while len(drawn) < count:
        deck = list(kinds)
        dice.shuffle(deck)
        for kind in deck[: count - len(drawn)]:
            drawn.append(
                Fault(
                    number=len(drawn) + 1,
                    kind=kind,
                    after_steps=dice.randint(1, 7),
                    delay_s=dice.uniform(0.0, 0.3),
                    seed=dice.randrange(2**32),
                )
            )
    return drawn


def advance(run: Run, progress: Progress, *, to: int, max_starts: int) -> int:
    """Wait until the run has logged step `to`, starting it where it has ended; the number of starts.

    Raises:
        CampaignError: more than max_starts were needed, or it stands still.
    """
    deadline, starts = time.monotonic() + ON_AGAIN_S, 0
    while progress.read() < to:
        if run.has_ended():
            if starts == max_starts:
                raise CampaignError(
                    f"the run ended at step {progress.reached}\n{run.log()[-4000:]}"
                )
            starts += 1
            run.start()
        if time.monotonic() > deadline:
            raise CampaignError(
                f"no step {to} within {ON_AGAIN_S:.0f} s, step {progress.reached} is reached\n{run.log()[-4000:]}"
            )
        time.sleep(0.02)
    return starts


def strike_all(run: Run, progress: Progress, drawn: Sequence[Fault], site: Site) -> None:  # fmt: skip
    """One fault after the other; says each as it goes."""
    for fault in drawn:
        kind = KINDS[fault.kind]
        # Two starts: one more where the first has found what the fault before it left.
        advance(run, progress, to=progress.read() + fault.after_steps, max_starts=2)
        time.sleep(fault.delay_s)
        step, before, since = progress.read(), run.starts, time.monotonic()
        try:
            kind.strike(run, random.Random(fault.seed))
            advance(
                run, progress, to=progress.read() + 2, max_starts=2 if kind.ends_the_start else 0
            )
        except AssertionError as error:
            raise CampaignError(
                f"fault {fault.number}, {fault.kind}, at step {step}: {error}"
            ) from None
        starts, seconds = run.starts - before, round(time.monotonic() - since, 1)
        site.ledger.add(seed=site.seed, fault=fault.number, kind=fault.kind, step=step, starts=starts, seconds=seconds)  # fmt: skip
        print(
            f"{fault.number:4d} {fault.kind:28s} at step {step:5d}: {starts} starts, "
            f"{seconds:5.1f} s until two steps further",
            flush=True,
        )


def give_an_end(run: LocalRun, progress: Progress) -> int:
    """Let the run end by itself some steps further; its last step."""
    run.stop()
    last = progress.read() + LAST_STEPS
    run.settings.append(f"training.total_steps={last}")
    run.start()
    if not wait_for(run.has_ended, ON_AGAIN_S) or run.exit_code() != 0:
        raise CampaignError(f"the run does not end at step {last}\n{run.log()[-4000:]}")
    progress.read()
    return last


def differences(disturbed: Sequence[dict], undisturbed: Sequence[dict], last: int) -> list[str]:
    """Where logged steps differ: each of 1 .. last must be there, and as often as it was done, the same."""
    expected = {row["step"]: [row[key] for key in NUMBERS] for row in undisturbed}
    found = [f"step {step} was never logged" for step in range(1, last + 1) if step not in {row["step"] for row in disturbed}]  # fmt: skip
    for row in disturbed:
        numbers = [row[key] for key in NUMBERS]
        if numbers != expected.get(row["step"]):
            found.append(f"step {row['step']}: {numbers}, undisturbed {expected.get(row['step'])}")
    return found


def differing_files(disturbed: Path, undisturbed: Path) -> list[str]:
    """Files of tensors that differ between two checkpoints, of which each is whole."""
    found = [*checkpoints.damage(disturbed), *checkpoints.damage(undisturbed)]
    if found:
        return found
    sums = [
        {name: digest for name, digest in checkpoints.read_sums(folder).items() if name != checkpoints.RECORD}
        for folder in (disturbed, undisturbed)
    ]  # fmt: skip
    return [f"{name} differs" for name in sorted({*sums[0], *sums[1]}) if sums[0].get(name) != sums[1].get(name)]  # fmt: skip


def isolate(argv: Sequence[str]) -> None:
    """Become a process with mounts and a network of its own, where that is allowed."""
    probe = subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True)
    if os.geteuid() == 0 and probe.returncode == 0:
        words = ["unshare", "--mount", "--net", "--", sys.executable, "-m", "tests.campaign", *argv]
        os.execvpe(words[0], words, {**os.environ, ISOLATED: "1"})


def strike_a_run(site: Site, drawn: Sequence[Fault], preloaded: Preloaded) -> int:
    """A run with these faults and an undisturbed one, compared; their last step.

    Raises:
        CampaignError: a fault was not survived, or left a trace.
    """
    of_this_run = f"seed={site.seed * 1000 + drawn[0].number}"
    run = site.run(preloaded, of_this_run)
    progress = Progress(run.run_dir)
    local = [fault for fault in drawn if not KINDS[fault.kind].on_slurm]
    on_slurm = [fault for fault in drawn if KINDS[fault.kind].on_slurm]
    try:
        strike_all(run, progress, local, site)
        run.stop()
        if on_slurm:
            with SlurmCluster(
                site.folder / "box", num_nodes=3, kill_wait_s=20, grace_s=30
            ) as cluster:
                job = SlurmRun(cluster, site.disk, site.folder / "data", settings=(of_this_run,))
                strike_all(job, progress, on_slurm, site)
                job.stop()
            shutil.rmtree(site.folder / "box")
        last = give_an_end(run, progress)
    finally:
        run.stop()
    alone = site.run(preloaded, of_this_run, f"training.total_steps={last}", name=UNDISTURBED)
    try:
        advance(alone, reference := Progress(alone.run_dir), to=last, max_starts=1)
        wait_for(alone.has_ended, ON_AGAIN_S)
    finally:
        alone.stop()
    name = checkpoints.name_of(last)
    found = differences(progress.rows, reference.rows, last)
    found += differing_files(
        run.run_dir / "checkpoints" / name, alone.run_dir / "checkpoints" / name
    )
    if found:
        numbers = f"{drawn[0].number} to {drawn[-1].number}"
        raise CampaignError("\n".join([f"faults {numbers} left a trace", *found[:20]]))
    for ended in (run, alone):
        shutil.rmtree(ended.run_dir)
    return last


def campaign(site: Site, drawn: Sequence[Fault], *, round_size: int, tell: Callable[[], object]) -> None:  # fmt: skip
    """Run after run until all are survived; `tell` is called after each.

    Raises:
        CampaignError: a fault was not survived, or left a trace.
    """
    clock = WallClock(site.folder)
    clock.set(0)
    if not faults.lacks_isolation():
        command("ip", "link", "set", "lo", "up")
        command("mount", "-t", "tmpfs", "-o", DISK_SIZE, "tmpfs", str(site.disk))
    environment = {**clock.environment, "OMP_NUM_THREADS": "1"}
    with Preloaded(site.folder, env=environment) as preloaded:
        for first in range(0, len(drawn), round_size):
            struck = drawn[first : first + round_size]
            try:
                last = strike_a_run(site, struck, preloaded)
            except AssertionError:  # the disk ends with this process
                kept = site.folder / f"lost-{site.seed}-{struck[0].number}"
                shutil.copytree(site.disk, kept, symlinks=True, dirs_exist_ok=True)
                raise
            site.ledger.add(seed=site.seed, equal=[fault.number for fault in struck], last=last)
            tell()


def main(argv: Sequence[str]) -> int:
    """Exit code 1 when something was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.splitlines()[0])  # fmt: skip
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--round", type=int, default=len(KINDS), help="faults of one run, which is compared then")  # fmt: skip
    parser.add_argument(
        "--plain-every", type=int, default=8, help="starts of which one is not forked"
    )
    parser.add_argument("--kinds", default=",".join(KINDS), help="separated by commas")
    parser.add_argument("--folder", type=Path, help="where the runs lie; default: a new one, kept when a fault was lost")  # fmt: skip
    parser.add_argument("--report", type=Path, help="the table goes there too, its lines to .jsonl beside it: another campaign adds to them")  # fmt: skip
    options = parser.parse_args(argv)
    if ISOLATED not in os.environ:
        isolate(argv)
    kinds = [word.strip() for word in options.kinds.split(",")]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"no such kind: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    skipped = {kind: why for kind in kinds if (why := KINDS[kind].needs())}
    for kind, why in skipped.items():
        print(f"skipped: {kind} needs {why}", flush=True)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="campaign-"))
    for name in ("disk", "box"):  # of a campaign that was cut off
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "disk").mkdir(parents=True)
    if not (folder / "data").exists():
        write_data(folder / "data")
    site = Site(
        folder=folder,
        seed=options.seed,
        ledger=Ledger((options.report or folder / "report.md").with_suffix(".jsonl")),
        plain_every=options.plain_every,
    )
    machine = f"{time.strftime('%Y-%m-%d', time.gmtime())}, {os.cpu_count()} cores, Python {platform.python_version()}."  # fmt: skip
    done = site.ledger.done(site.seed)
    drawn = draw(options.seed, options.faults, [kind for kind in kinds if kind not in skipped])
    drawn = [fault for fault in drawn if (fault.number, fault.kind) not in done]

    def tell() -> str:
        text = site.ledger.report(list(KINDS), skipped, machine)
        if options.report:
            options.report.write_text(text)
        return text

    try:
        campaign(site, drawn, round_size=options.round, tell=tell)
    except AssertionError as error:  # the test Slurm's are not of this program
        site.ledger.add(seed=site.seed, lost=str(error))
        tell()
        print(f"LOST: {error}\nthe logs are in {folder}", flush=True)
        return 1
    print(tell())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
