"""Run the benchmarks one after another and write what they print to benchmarks/RESULTS.md.

python -m benchmarks                    all of them
python -m benchmarks train_step loader  some of them; the others' sections stay as they are
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
BENCHMARKS = {
    "tokenize": [],
    "loader": [],
    "train_step": ["--rounds", "4"],
    "finetune": ["--rounds", "4"],
    "parallel": [],
    "checkpoint": [],
    "muon": [],
    "looks": [],
    "commands": [],
    "gpu_ladder": ["--rungs", "tiny"],
}
TITLE = "# Benchmarks\n\nRatios compare contenders of one run; absolute numbers belong to the machine named with them.\n"


def hardware() -> str:
    """Processor, cores and date, in a line."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{time.strftime('%Y-%m-%d')}, {names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def sections() -> dict[str, str]:
    """Name to text of the sections that RESULTS.md has."""
    if not RESULTS.exists():
        return {}
    parts = re.split(r"^## (\w+)\n", RESULTS.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2]))


def main(names: list[str]) -> int:
    """Exit code 1 when a benchmark failed; its section then says so."""
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        print(
            f"error: no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}.",
            file=sys.stderr,
        )
        return 2
    kept, failed = sections(), False
    for name in names or BENCHMARKS:
        print(f"== {name}", flush=True)
        # As a module: run as a file, its folder would be first on the path, where tokenize.py is not the library's.
        command = ["python", "-m", f"benchmarks.{name}", *BENCHMARKS[name]]
        done = subprocess.run(
            [sys.executable, *command[1:]], stdout=subprocess.PIPE, text=True, cwd=HERE.parent
        )
        failed |= done.returncode != 0
        print(done.stdout, flush=True)
        verdict = (
            "" if done.returncode == 0 else f"\nThis run failed with exit code {done.returncode}.\n"
        )
        text = done.stdout.strip()
        if "|---" not in text:  # a table in columns
            text = f"```\n{text}\n```"
        kept[name] = f"\n{hardware()}. `{' '.join(command)}`\n\n{text}\n{verdict}\n"
        body = "".join(f"## {key}\n{kept[key]}" for key in BENCHMARKS if key in kept)
        RESULTS.write_text(f"{TITLE}\n{body}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
