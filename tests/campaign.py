"""Strike one run with faults drawn from a seeded list; it must end as if nothing had happened.

    python -m tests.campaign --faults 300 --seed 1 --report report.md     about two hours on two cores; make soak
    python -m tests.campaign --faults 4 --kinds "full disk,W&B killed"    those alone

Four ranks, TP2 x PP2, asynchronous saves. A fault strikes at a random moment, some steps after the run has gone further
than ever; then the run must go on, started again by hand only where the kind allows it. After the last fault the run
gets a last step, an undisturbed one does as many, and every logged step (also those done twice), the samples, and all
tensors of the last checkpoint must be the same, bit by bit. Kinds that this machine cannot do are skipped by name. As
root it has mounts and a network of its own, which end with it. The first fault that is not survived ends the campaign.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint import folder as checkpoints
from tests.support import campaign_faults as faults
from tests.support.campaign_faults import ISOLATED, KINDS, command
from tests.support.campaign_run import (
    ON_AGAIN_S,
    CampaignError,
    LocalRun,
    Progress,
    Run,
    SlurmRun,
    wait_for,
    write_data,
)
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
class Survived:
    """A fault, and what it cost."""

    fault: Fault
    step: int
    starts: int
    """Starts that it took to go on."""
    seconds: float


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
                    after_steps=dice.randint(2, 14),
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


def strike_all(run: Run, progress: Progress, drawn: Sequence[Fault]) -> list[Survived]:
    """One fault after the other; says each as it goes."""
    survived = []
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
        except CampaignError as error:
            raise CampaignError(
                f"fault {fault.number}, {fault.kind}, at step {step}: {error}"
            ) from None
        survived.append(Survived(fault, step, run.starts - before, time.monotonic() - since))
        last = survived[-1]
        print(
            f"{fault.number:4d} {fault.kind:28s} at step {step:5d}: {last.starts} starts, "
            f"{last.seconds:5.1f} s until two steps further",
            flush=True,
        )
    return survived


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


def report(survived: Sequence[Survived], skipped: dict[str, str], *, seed: int, last: int) -> str:
    """A table by kind, in markdown."""
    lines = [
        f"{len(survived)} faults survived (seed {seed}), {last} steps, {sum(s.starts for s in survived)} starts: losses, "
        "gradient norms, sample hashes and all tensors of the last checkpoint equal an undisturbed run's, bit by bit.",
        "",
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, {os.cpu_count()} cores, Python {platform.python_version()}.",
        "",
        "| fault | survived | starts | seconds until two steps further, median and longest |",
        "|---|---|---|---|",
    ]
    for kind in KINDS:
        mine = [s for s in survived if s.fault.kind == kind]
        if mine:
            seconds = sorted(s.seconds for s in mine)
            middle = seconds[len(seconds) // 2]
            starts = sum(s.starts for s in mine)
            lines.append(f"| {kind} | {len(mine)} | {starts} | {middle:.1f}, {seconds[-1]:.1f} |")
    lines += [f"| {kind} | skipped: needs {why} | | |" for kind, why in skipped.items()]
    return "\n".join(lines) + "\n"


def isolate(argv: Sequence[str]) -> None:
    """Become a process with mounts and a network of its own, where that is allowed."""
    probe = subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True)
    if os.geteuid() == 0 and probe.returncode == 0:
        words = ["unshare", "--mount", "--net", "--", sys.executable, "-m", "tests.campaign", *argv]
        os.execvpe(words[0], words, {**os.environ, ISOLATED: "1"})


def campaign(folder: Path, *, count: int, seed: int, kinds: Sequence[str]) -> str:
    """All of it; the report.

    Raises:
        CampaignError: a fault was not survived, or left a trace.
    """
    skipped = {kind: why for kind in kinds if (why := KINDS[kind].needs())}
    able = [kind for kind in kinds if kind not in skipped]
    for kind, why in skipped.items():
        print(f"skipped: {kind} needs {why}", flush=True)
    drawn = draw(seed, count, able)
    disk = folder / "disk"
    disk.mkdir(parents=True)
    write_data(folder / "data")
    if not faults.lacks_isolation():
        command("ip", "link", "set", "lo", "up")
        command("mount", "-t", "tmpfs", "-o", DISK_SIZE, "tmpfs", str(disk))
    run = LocalRun(disk, folder / "data")
    progress = Progress(run.run_dir)
    try:
        survived = strike_all(run, progress, [f for f in drawn if not KINDS[f.kind].on_slurm])
        run.stop()
        if on_slurm := [f for f in drawn if KINDS[f.kind].on_slurm]:
            with SlurmCluster(folder / "box", num_nodes=3, kill_wait_s=20, grace_s=30) as cluster:
                job = SlurmRun(cluster, disk, folder / "data")
                survived += strike_all(job, progress, on_slurm)
                job.stop()
        last = give_an_end(run, progress)
        alone = LocalRun(
            disk, folder / "data", name=UNDISTURBED, settings=(f"training.total_steps={last}",)
        )
        advance(alone, reference := Progress(alone.run_dir), to=last, max_starts=1)
        wait_for(alone.has_ended, ON_AGAIN_S)
    finally:
        run.stop()
    name = checkpoints.name_of(last)
    found = differences(progress.rows, reference.rows, last)
    found += differing_files(
        run.run_dir / "checkpoints" / name, alone.run_dir / "checkpoints" / name
    )
    if found:
        raise CampaignError("\n".join(found[:20]))
    return report(survived, skipped, seed=seed, last=last)


def main(argv: Sequence[str]) -> int:
    """Exit code 1 when something was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.splitlines()[0])  # fmt: skip
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS), help="separated by commas")
    parser.add_argument("--folder", type=Path, help="where the runs lie; default: a new one, kept when a fault was lost")  # fmt: skip
    parser.add_argument("--report", type=Path, help="the table goes there too")
    options = parser.parse_args(argv)
    if ISOLATED not in os.environ:
        isolate(argv)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="campaign-"))
    kinds = [word.strip() for word in options.kinds.split(",")]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"no such kind: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    try:
        text = campaign(folder, count=options.faults, seed=options.seed, kinds=kinds)
    except CampaignError as error:
        print(f"LOST: {error}\nthe logs are in {folder}", flush=True)
        return 1
    print(text)
    if options.report:
        options.report.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
