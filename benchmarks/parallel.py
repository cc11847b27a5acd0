"""Two processes that train one model: ours at every axis, against what torch offers, in one run.

    python benchmarks/parallel.py                                both precisions, every contender
    python benchmarks/parallel.py --contenders 'ours TP2' 'DTensor TP2' --precisions fp32
    python benchmarks/parallel.py --profile 'ours TP2 + SP'      where a step's time goes, collectives by kind

A contender is two processes of one thread each, or one process of two threads, on the `medium` shape of train_step.py
(6 layers, 384 wide, 8 x 256 tokens). Rounds alternate between DDP and another, so that a noisy machine disturbs both
alike; the ratio is the median over rounds of tokens/s over DDP's in the round before. The two are in memory, no others.
PP2 runs 4 micro-batches: its bubble leaves 4 / 5 of the time. The loss that the first process sees after the same
number of steps stands beside: a sign of life, ours begins from other weights.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"]

from benchmarks.contenders.parallel_steps import (  # noqa: E402
    ALONE,
    NAMES,
    build,
    tokens_of_step,
)

PROCESSES = 2
WARM_UP = 3  # steps before the first round


class Contender:
    """Its processes, waiting for the number of steps of a round."""

    def __init__(self, name: str, precision: str, *, profile: bool = False) -> None:
        """Start them; they build the model and make the first steps."""
        alone = name in ALONE
        world = 1 if alone else PROCESSES
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        threads = str(PROCESSES // world)
        environment = {
            **os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false",
            "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        words = ["--profiled"] if profile else []
        # Files, not pipes, which nobody reads until the end: a process that has written 64 KiB waits.
        self.said = [tempfile.TemporaryFile("w+") for _ in range(world)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, "--worker", name, precision, *words],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE if rank == 0 else self.said[rank], stderr=self.said[rank],
                text=True, cwd=ROOT,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world)
        ]  # fmt: skip

    def answer(self, steps: int | None = None) -> dict[str, Any]:
        """What the first process says after so many steps.

        Raises:
            ChildProcessError: it died, with the end of what it said.
        """
        with suppress(BrokenPipeError):  # it died: what it said is below
            for process in self.processes:
                if steps is not None and process.stdin is not None:
                    process.stdin.write(f"{steps}\n")
                    process.stdin.flush()
        out = self.processes[0].stdout
        assert out is not None
        for line in out:
            if line.startswith("{"):
                return json.loads(line)
        self.said[0].seek(0)
        raise ChildProcessError(self.said[0].read()[-1500:])

    def begin(self, seconds: float) -> float:
        """Wait for it, and find how many steps fill a round; the loss after those steps."""
        self.answer()
        first = self.answer(2)
        self.steps = max(1, round(seconds / first["step_s"]))
        return first["loss"]

    def rounds(self, count: int) -> list[float]:
        """Seconds of a step in each of so many rounds."""
        return [self.answer(self.steps)["step_s"] for _ in range(count)]

    def stop(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        for file in self.said:
            file.close()


def worker(name: str, precision: str, *, profiled: bool) -> None:
    """Make the steps of each line of stdin; print what one takes."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    step = build(name, precision)
    for _ in range(WARM_UP):
        loss = step()
    print(json.dumps({"loss": loss}), flush=True)
    for line in sys.stdin:
        if profiled:
            print(json.dumps({"profile": profile(step, int(line))}), flush=True)
            continue
        began = time.perf_counter()
        for _ in range(int(line)):
            loss = step()
        seconds = (time.perf_counter() - began) / int(line)
        print(json.dumps({"step_s": seconds, "loss": loss}), flush=True)


def profile(step: Callable[[], float], steps: int) -> str:
    """Milliseconds of a step by operator, this thread's own; the life of each kind of collective, and what it hid behind."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    began = time.perf_counter()
    with record(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
    wall = (time.perf_counter() - began) / steps * 1e3
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)[:16]
    lines = [f"step {wall:.1f} ms"]
    lines += [
        f"{row.self_cpu_time_total / steps / 1e3:8.2f} ms  {row.count / steps:7.1f} times  {row.key}"
        for row in rows
    ]
    spans = [(e.name, e.time_range.start / 1e3, e.time_range.end / 1e3) for e in found.events()]
    return "\n".join([*lines, *overlap(spans, steps)])


def overlap(spans: list[tuple[str, float, float]], steps: int) -> Iterator[str]:
    """How long each kind of collective lived in a step, and for how much of it this process computed.

    Args:
        spans: (name, begin, end) of every event, in ms.
        steps: that they are of.
    """
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, begin, end in spans:
        if name.startswith(("gloo:", "nccl:")):
            kinds.setdefault(name, []).append((begin, end))
    computing = merged([(begin, end) for name, begin, end in spans if name.startswith("aten::")])
    every = [span for found in kinds.values() for span in found]
    for name, found in [*sorted(kinds.items()), ("any collective", every)]:
        alive = merged(found)
        total, hidden = (length(x) / steps for x in (alive, shared(alive, computing)))
        share = hidden / total if total else 0.0
        yield (
            f"{total:8.2f} ms  {len(found) / steps:7.1f} times  {name} under way; "
            f"{hidden:.2f} ms of it ({share:.0%}) beside operators"
        )


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Their union, in order."""
    union: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((begin, end))
    return union


def shared(
    one: list[tuple[float, float]], other: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    """What lies in both unions."""
    found, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        begin, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if begin < end:
            found.append((begin, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(union: list[tuple[float, float]]) -> float:
    """Of all its spans together."""
    return sum(end - begin for begin, end in union)


def compare(names: list[str], precision: str, *, rounds: int, seconds: float) -> Iterator[str]:
    """Rows of the table for one precision; DDP and one other are in memory at a time."""
    base = Contender("DDP", precision)
    try:
        loss = base.begin(seconds)
        yield row(precision, "DDP", base.rounds(2), [1.0], loss)
        for name in names:
            yield against(base, name, precision, rounds=rounds, seconds=seconds)
    finally:
        base.stop()


def against(base: Contender, name: str, precision: str, *, rounds: int, seconds: float) -> str:
    """The row of one contender, whose rounds alternate with those of the base."""
    other = Contender(name, precision)
    try:
        loss = other.begin(seconds)
        ours, theirs = [], []
        for _ in range(rounds):
            theirs += base.rounds(1)
            ours += other.rounds(1)
    except ChildProcessError as error:
        print(f"{name} in {precision}:\n{error}", file=sys.stderr)
        return f"| {precision} | {name} | did not run | | |"
    finally:
        other.stop()
    return row(precision, name, ours, [b / a for a, b in zip(ours, theirs)], loss)


def row(precision: str, name: str, step_s: list[float], ratios: list[float], loss: float) -> str:
    """A line of the table."""
    rate, ratio = tokens_of_step() / statistics.median(step_s), statistics.median(ratios)
    spread = f" ({min(ratios):.2f}-{max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"| {precision} | {name} | {rate:,.0f} | {ratio:.2f}{spread} | {loss:.4f} |"


def main() -> None:
    """Print the table, or a profile."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a contender's round")
    parser.add_argument("--profile", choices=NAMES, help="of one contender instead")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker, profiled=options.profiled)
        return
    if options.profile:
        for precision in options.precisions:
            contender = Contender(options.profile, precision, profile=True)
            contender.answer()
            print(f"{options.profile}, {precision}: {contender.answer(5)['profile']}\n")
            contender.stop()
        return
    names = [name for name in options.contenders if name != "DDP"]
    print(f"{PROCESSES} processes of one thread, {options.rounds} rounds of {options.seconds} s\n")
    print(f"| precision | contender | tokens/s | ratio to DDP | loss after {WARM_UP + 2} steps |")
    print("|---|---|---|---|---|")
    for precision in options.precisions:
        for line in compare(names, precision, rounds=options.rounds, seconds=options.seconds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
