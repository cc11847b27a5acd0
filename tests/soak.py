"""One run of many steps, with saves, evaluations and rotated logs: what it holds must stay as it is.

    python -m tests.soak --steps 20000 --report soak.md     make soak; half an hour of one core

One process, a tiny model. Its memory, threads and open files are looked at as it goes; metrics.jsonl is renamed under
it, as logrotate does. In the end nothing may have grown since the first fifth, every logged step and evaluation must be
there once, and the folder must hold as many checkpoints as it is told to keep.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.tracking.row_file import read_rows
from tests.support.exported import tokenizer_file
from tests.support.layouts import VOCAB
from tests.support.slurm_cluster import REPO
from tests.support.token_dataset import write_dataset

LOG_EVERY, SAVES, EVALUATIONS, ROTATIONS, KEEP = 10, 100, 40, 10, 2
MOST_GROWTH_MB = 8.0
"""Of memory, from the first fifth to the last: 0.5 KB a step of 16,000 is a leak."""
LOOK_S = 0.2
"""So that a short soak has dozens of looks: the fewest files and threads of a few may be those of a save."""
SETTINGS = [
    "model.num_layers=2", "model.hidden_size=32", "model.max_seq_len=32", "schedule=constant", "schedule.warmup_steps=20",
    "training.global_batch_size=4", "training.micro_batch_size=4", "training.precision=fp32", "optimizer.lr=0.003",
    f"tracking.log_every={LOG_EVERY}", "tracking.wandb=disabled", f"checkpoint.keep_last={KEEP}", "training.eval_sequences=16",
]  # fmt: skip


class Look(NamedTuple):
    """What the run holds at a time."""

    step: int
    memory_mb: float
    threads: int
    files: int
    folder_mb: float


class SoakError(AssertionError):
    """Something grows, or is missing."""


def look(pid: int, step: int, folder: Path) -> Look | None:
    """What a process holds; None when it has ended."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())  # fmt: skip
        files = len(os.listdir(f"/proc/{pid}/fd"))
        memory_mb = int(status["VmRSS"].split()[0]) / 1024
    except (OSError, KeyError):
        return None
    # os.walk goes on where a folder is deleted under it, as old checkpoints are; a glob does not.
    files_there = (Path(at) / name for at, _, names in os.walk(folder / "checkpoints") for name in names)  # fmt: skip
    size = sum(map(size_of, files_there))
    return Look(step, memory_mb, int(status["Threads"]), files, size / 1e6)


def size_of(path: Path) -> int:
    """0 when it has been renamed or deleted since it was listed, as a save's files are."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def rows(folder: Path) -> list[dict]:
    """The lines of all metrics files, the rotated ones first; of an ended run, so half a line is an error."""
    files = sorted(folder.glob("metrics.jsonl*"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def problems(looks: Sequence[Look], logged: Sequence[dict], *, steps: int, eval_every: int) -> list[str]:  # fmt: skip
    """What has grown since the first fifth, and what was lost."""
    found = []
    early = [seen for seen in looks if 0.1 * steps <= seen.step <= 0.3 * steps]
    late = [seen for seen in looks if seen.step >= 0.8 * steps]
    if not early or not late:
        return [f"{len(looks)} looks are too few"]
    before, after = (statistics.median(seen.memory_mb for seen in part) for part in (early, late))
    if after - before > MOST_GROWTH_MB:
        found.append(f"memory grew from {before:.1f} to {after:.1f} MB")
    for name in ("threads", "files"):
        # A save has some of its own while it is written.
        before, after = (min(getattr(seen, name) for seen in part) for part in (early, late))
        if after > before:
            found.append(f"{name} grew from {before} to {after}")
    trained = Counter(row["step"] for row in logged if "train/loss" in row)
    evaluated = Counter(row["step"] for row in logged if any(key.startswith("val/") for key in row))
    for what, seen, every in (("logged", trained, LOG_EVERY), ("evaluated", evaluated, eval_every)):
        due = set(range(every, steps + 1, every))
        if lost := sorted(due - set(seen)):
            found.append(f"{len(lost)} steps were not {what}, the first is {lost[0]}")
        if double := [step for step in sorted(due) if seen[step] > 1]:
            found.append(f"{len(double)} steps were {what} twice, the first is {double[0]}")
    return found


def report(looks: Sequence[Look], *, steps: int, seconds: float) -> str:
    """What was held at each tenth of the way, in markdown."""
    text = [
        f"{steps:,} steps, {SAVES} saves, {EVALUATIONS} evaluations, {ROTATIONS} rotations of metrics.jsonl in {seconds:,.0f} s.",
        "",
        "| step | memory MB | threads | open files | checkpoints MB |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for tenth in range(1, 11):
        seen = min(looks, key=lambda one: abs(one.step - tenth * steps / 10))
        text.append(f"| {seen.step:,} | {seen.memory_mb:.1f} | {seen.threads} | {seen.files} | {seen.folder_mb:.2f} |")  # fmt: skip
    return "\n".join(text) + "\n"


def soak(folder: Path, *, steps: int) -> str:
    """The run; the report.

    Raises:
        SoakError: it ended otherwise than it should, grew, or lost something.
    """
    tokens = np.cumsum(np.random.default_rng(0).integers(0, 4, 8192) * 5 + 1) % 64
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_file(folder).read_bytes()  # bits per byte are asked for
    for name in ("train", "validation"):
        write_dataset(
            folder / "data" / name, np.split(tokens, 2), block_tokens=1024, vocab_size=VOCAB, tokenizer=tokenizer,
        )  # fmt: skip
    run_dir, eval_every = folder / "soak", steps // EVALUATIONS
    settings = [
        "name=soak", f"runs_dir={folder}", f"data.path={folder / 'data'}", *SETTINGS, f"training.total_steps={steps}",
        f"training.eval_every={eval_every}", f"checkpoint.save_every={steps // SAVES}",
    ]  # fmt: skip
    looks: list[Look] = []
    metrics, step, rotated, since = run_dir / "metrics.jsonl", 0, 0, time.monotonic()
    with (folder / "soak.log").open("wb") as log:
        words = [sys.executable, "-m", "pipeline.train", *settings]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, cwd=REPO, stdout=log, stderr=log, env=environment)
    try:
        while process.poll() is None:
            time.sleep(LOOK_S)
            logged = read_rows(metrics) if metrics.exists() else []
            step = max([step, *(row.get("step", 0) for row in logged)])
            if step and (seen := look(process.pid, step, run_dir)):
                looks.append(seen)
            if step >= (rotated + 1) * steps / (ROTATIONS + 1) and metrics.exists():
                rotated += 1
                metrics.rename(run_dir / f"metrics.jsonl.{rotated}")
    finally:
        process.kill()
    if process.returncode != 0:
        tail = (folder / "soak.log").read_text(errors="replace")[-3000:]
        raise SoakError(f"the run ended with {process.returncode}\n{tail}")
    found = problems(looks, rows(run_dir), steps=steps, eval_every=eval_every)
    kept = len(list(run_dir.glob("checkpoints/step-*")))
    found += [] if kept == KEEP else [f"{kept} checkpoints are kept"]
    text = report(looks, steps=steps, seconds=time.monotonic() - since)
    if found:
        raise SoakError("\n".join([*found, text]))
    return text


def main(argv: Sequence[str]) -> int:
    """Exit code 1 when something grew or was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])  # fmt: skip
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="where the run lies; default: a new one")
    parser.add_argument("--report", type=Path, help="the table goes there too")
    options = parser.parse_args(argv)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        text = soak(folder, steps=options.steps)
    except SoakError as error:
        print(f"NOT FLAT: {error}\nthe run is in {folder}", flush=True)
        return 1
    print(text)
    if options.report:
        options.report.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
