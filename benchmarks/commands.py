"""How long small commands take, in CPU seconds: of the process and its children, one thread, as other jobs count little so.

    python -m benchmarks.commands [--rounds 3]

Each is asked of a checkpoint of a model of 0.9 M parameters, so that what is measured is the start: imports, settings, files.
`import torch` is what a command that computes cannot go below; ratios are medians over rounds in which all commands alternate.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOOR = "import torch"


def commands(folder: Path) -> dict[str, list[str]]:
    """Name to the words behind `python`; after the first run of each everything is in memory."""
    run, data = str(folder / "runs/small"), str(folder / "data")
    door = ["-m", "pipeline.pretrain"]
    return {
        FLOOR: ["-c", "import torch"],
        "train --help": [*door, "train", "--help"],
        "show DATA": [*door, "show", f"{data}/train"],
        "checkpoint show RUN": [*door, "checkpoint", "show", run],
        "plan": [*door, "plan", "model=tiny", f"data.path={data}"],
        "generate RUN, 20 tokens": [*door, "generate", run, "the", "max_new_tokens=20"],
        "evaluate RUN, 4 sequences": [*door, "evaluate", run, "sequences=4"],
        "export RUN": [*door, "export", run, str(folder / "exported-{round}")],
    }


def cpu_seconds(words: list[str], folder: Path) -> float:
    """Of a command, which must end well."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def prepare(folder: Path) -> None:
    """Data and a run of two steps."""
    from tests.support.small_runs import write_data

    (folder / "data").mkdir()
    write_data(folder / "data")
    train = ["-m", "pipeline.train", "experiment=quickstart", "name=small", "data.path=data",
             "training.total_steps=2", "schedule.warmup_steps=1", "tracking.wandb=disabled"]  # fmt: skip
    cpu_seconds(train, folder)


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        found: dict[str, list[float]] = {name: [] for name in commands(folder)}
        for number in range(-1, rounds):  # the first round fills the caches of the disk
            for name, words in commands(folder).items():
                seconds = cpu_seconds([w.format(round=number) for w in words], folder)
                found[name] += [seconds] * (number >= 0)
    print("| command | CPU seconds (lowest-highest) | times `import torch` |\n|---|---|---|")
    for name, values in found.items():
        ratio = statistics.median(v / f for v, f in zip(values, found[FLOOR], strict=True))
        middle = statistics.median(values)
        print(
            f"| {name} | {middle:.2f} ({min(values):.2f}-{max(values):.2f}) | {ratio:.2f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
