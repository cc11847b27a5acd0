"""Tokens per second of one data-loading process: ours against what a user would pick instead, on the same tokens.

    python -m benchmarks.loader                            16 shards of 4 Mi tokens, three rounds
    python -m benchmarks.loader --rounds 5 --cpu-s 4       longer
    python -m benchmarks.loader --contenders ours ours+masks --against ../old       ours here over ours in another checkout
    python -m benchmarks.loader --mosaicml VENV/bin/python  mosaicml-streaming too, which needs a Python of its own:
                                                           python -m venv VENV; VENV/bin/pip install mosaicml-streaming

Contenders: ours as the trainer uses it, also with document masks; stock webdataset on the same shards (shuffle 1000);
a random-offset np.memmap reader (nanoGPT's get_batch); megatron.core's GPTDataset with torch's default_collate;
mosaicml-streaming on the same sequences (it wants transformers 4, this project 5). Each is a process of its own and hands over int64
(tokens, labels) micro-batches of 8 x 2048 from page-cached files. Rounds alternate between the contenders; a read ends
after a fixed CPU time and tokens are counted per CPU second, so that neighbours on the machine distort little (the wall
rate is shown beside it). Start-up is from the first constructor to the first micro-batch, imports not counted; resume
is the same at half an epoch. Last, the order of 300,000 shards (10 trillion tokens; the manifest is made up, no shard is
read): set-up from the manifest's bytes to the first step's addresses, the same at half an epoch, and resident memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

# benchmarks/tokenize.py has the name of a module of the standard library: this folder must not be searched.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"]

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402

from benchmarks.contenders.loader_data import (  # noqa: E402
    NUM_SHARDS,
    SEQ_LEN,
    SHARD_TOKENS,
    prepare,
    prepare_streaming,
    quiet,
    streaming_problem,
)
from benchmarks.contenders.loaders import GLOBAL_BATCH, MICRO_BATCH, NAMES, contender  # noqa: E402

# What another checkout is asked for: its shards, read by its loader. Its --one answers as ours does.
PREPARE = (
    "import sys, pathlib; from benchmarks.loader import prepare; prepare(pathlib.Path(sys.argv[1]))"
)


def measure(name: str, folder: Path, cpu_s: float) -> dict[str, float]:
    """One round of one contender in this process."""
    make = contender(name)
    with quiet():
        next(make(folder, 0.0))  # imports, kernels, page cache
        began = time.process_time()
        batches = make(folder, 0.0)
        next(batches)
        startup = time.process_time() - began
        began = time.process_time()
        next(make(folder, 0.5))
        resume = time.process_time() - began
        for _ in range(4 * GLOBAL_BATCH // MICRO_BATCH):  # what was read ahead is not counted
            next(batches)
        wall, cpu, count = time.perf_counter(), time.process_time(), 0
        while time.process_time() - cpu < cpu_s:
            for _ in range(GLOBAL_BATCH // MICRO_BATCH):
                next(batches)
            count += GLOBAL_BATCH * SEQ_LEN
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "cpu_rate": count / cpu / 1e6,
        "wall_rate": count / wall / 1e6,
        "startup": startup * 1e3,
        "resume": resume * 1e3,
    }


def scale(folder: Path) -> dict[str, float]:
    """Set-up and resume of a dataset of 300,000 shards, in a process that imports no torch."""
    from pipeline.config.data import DataConfig, DatasetConfig
    from pipeline.data.datasets import open_datasets
    from pipeline.data.sampler import Sampler

    cfg = DataConfig(train=[DatasetConfig(path=str(folder / "ours-300k"))], lanes=128, window=32)
    began = time.perf_counter()
    datasets = open_datasets(cfg.train, cfg=cfg, cache_dir=folder)
    sampler = Sampler(cfg, datasets, seq_len=SEQ_LEN, seed=1)
    sampler.addresses(sampler.advance(sampler.start(), GLOBAL_BATCH)[0])
    setup = time.perf_counter() - began
    began = time.perf_counter()
    half = sampler.skip(sampler.start(), sampler.orders[0].epoch_size // 2)
    sampler.addresses(sampler.advance(half, GLOBAL_BATCH)[0])
    resume = time.perf_counter() - began
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    return {
        "setup": setup * 1e3,
        "resume": resume * 1e3,
        "peak_mib": peak,
        "tokens": float(datasets[0].manifest.tokens),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cpu-s", type=float, default=1.5, help="CPU seconds a contender reads in each round"
    )
    parser.add_argument("--contenders", nargs="*", default=NAMES)
    parser.add_argument(
        "--mosaicml", metavar="PYTHON", help="the Python that has mosaicml-streaming"
    )
    parser.add_argument(
        "--against", type=Path, help="another checkout, such as a git worktree of an older commit"
    )
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], Path(args.one[1]), args.cpu_s)))
        return
    pythons = {"streaming": args.mosaicml or sys.executable}
    problem = streaming_problem(pythons["streaming"])
    if problem and args.mosaicml:
        parser.error(f"--mosaicml {args.mosaicml} has no mosaicml-streaming: {problem}")
    names = [n for n in [*args.contenders, "ours-10k"] if n != "streaming" or not problem]
    if args.against:
        compare(args.against.resolve(), names, rounds=args.rounds, cpu_s=args.cpu_s)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        if "streaming" in names:
            in_process("mds", folder, 0.0, python=pythons["streaming"])
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(args.rounds):
            for name in names:
                rounds[name].append(in_process(name, folder, args.cpu_s, python=pythons.get(name)))
        large = [in_process("scale", folder, 0.0) for _ in range(args.rounds)]
    show(rounds, large)


def show(rounds: dict[str, list[dict[str, float]]], large: list[dict[str, float]]) -> None:
    """Print the table, and what the order of many shards took."""
    print(
        f"{NUM_SHARDS} shards x {SHARD_TOKENS >> 20} Mi tokens, seq_len {SEQ_LEN}, micro-batch {MICRO_BATCH},"
    )
    print(
        f"median of {len(large)} rounds (lowest-highest); load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores\n"
    )
    print("| contender | Mtok per CPU s | Mtok/s wall | ours is | start-up ms | resume ms |")
    print("|---|---|---|---|---|---|")
    for name, found in rounds.items():
        middle = {key: statistics.median(r[key] for r in found) for key in found[0]}
        spread = (
            f"({min(r['cpu_rate'] for r in found):.0f}-{max(r['cpu_rate'] for r in found):.0f})"
        )
        ratio = statistics.median(
            o["cpu_rate"] / r["cpu_rate"] for o, r in zip(rounds["ours"], found)
        )
        print(
            f"| {name} | {middle['cpu_rate']:.1f} {spread} | {middle['wall_rate']:.1f} | {ratio:.1f}x | "
            f"{middle['startup']:.1f} | {middle['resume']:.1f} |"
        )
    middle = {key: statistics.median(r[key] for r in large) for key in large[0]}
    print(
        f"\n300,000 shards, {middle['tokens'] / 1e12:.1f} trillion tokens: set-up {middle['setup']:.0f} ms, resume at half "
        f"an epoch {middle['resume']:.1f} ms, peak resident memory {middle['peak_mib']:.0f} MiB"
    )


def compare(other: Path, names: list[str], *, rounds: int, cpu_s: float) -> None:
    """Print how our contenders here stand to those of another checkout, each on shards of its own.

    Every second round begins with the other one, so that neither always follows on a warm cache.
    """
    ours = [*(name for name in names if name.startswith("ours")), "scale"]
    ratios: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as here, tempfile.TemporaryDirectory() as there:
        prepare(Path(here))
        subprocess.run([sys.executable, "-c", PREPARE, there], cwd=other, check=True)
        sides = [(ROOT, here), (other, there)]
        for number in range(rounds):
            for name in ours:
                found = {
                    root: in_process(name, folder, cpu_s, root=root)
                    for root, folder in (sides[::-1] if number % 2 else sides)
                }
                for key, value in found[ROOT].items():
                    ratios.setdefault((name, key), []).append(value / found[other][key])
    print(
        f"here over {other}, medians of {rounds} rounds (lowest-highest); rates: more is better\n"
    )
    print("| contender | number | here / there |")
    print("|---|---|---|")
    for (name, key), found in ratios.items():
        print(
            f"| {name} | {key} | {statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f}) |"
        )


def one(name: str, folder: Path, cpu_s: float) -> dict[str, float]:
    """What a process of its own does: a contender's round, or what is no contender."""
    if name == "mds":
        return {"samples": prepare_streaming(folder)}
    return scale(folder) if name == "scale" else measure(name, folder, cpu_s)


def in_process(
    name: str, folder: str, cpu_s: float, *, root: Path = ROOT, python: str | None = None
) -> dict[str, float]:
    """one() in a process of its own, with one thread a library; of another checkout or Python, where one is given."""
    command = [
        python or sys.executable,
        "-m",
        "benchmarks.loader",
        "--cpu-s",
        str(cpu_s),
        "--one",
        name,
        folder,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
