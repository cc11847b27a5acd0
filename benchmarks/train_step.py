"""A training step of ours against what a user would pick instead, on one device.

    python benchmarks/train_step.py                          every shape and precision, one thread
    python benchmarks/train_step.py --shapes small --precisions fp32 --rounds 5
    python benchmarks/train_step.py --contenders ours --against ../old          ours here beside ours in another checkout

Contenders: ours; a plain eager torch GPT with nanoGPT's arithmetic (written here); the same under torch.compile;
Hugging Face's GPT2LMHeadModel; Hugging Face under DeepSpeed ZeRO-1. Each lives in a process of its own with the same
threads and the same allocator (tcmalloc for all where it is found, else none). Rounds alternate between them, so that a
noisy machine disturbs all alike; the ratio is the median over rounds of tokens/s over the eager GPT's in the same
round.
The matmul ceiling is 2048 x 2048 products in the same precision, timed in the same rounds.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"]

from benchmarks.contenders.steps import NAMES, SHAPES, build  # noqa: E402

THERE = "ours there"
"""Ours in another checkout, whose --worker answers as ours does."""


def gemm_flops(precision: str) -> float:
    """FLOP/s of 2048 x 2048 products for about half a second."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(
        2048, 2048, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, device=device
    )
    a @ a
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.5:
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        count += 1
    return count * 2 * 2048**3 / (time.perf_counter() - start)


def worker(contender: str, shape: str, precision: str, threads: int) -> None:
    """Train a round of the seconds on each line of stdin; print its speed, memory and loss."""
    import torch

    torch.set_num_threads(threads)
    _, _, _, seq, batch, _ = SHAPES.get(shape, (0,) * 6)
    step = build(contender, shape, precision) if contender != "gemm" else None
    if step is not None:
        for _ in range(3):
            step()
    print("ready", flush=True)
    for line in sys.stdin:
        if step is None:
            answer: dict[str, float] = {"flops": gemm_flops(precision)}
        else:
            count, loss, start = 0, 0.0, time.perf_counter()
            while count < 2 or time.perf_counter() - start < float(line):
                loss, count = step(), count + 1
            rate = count * seq * batch / (time.perf_counter() - start)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_allocated() / 2**20
            answer = {"tokens_per_s": rate, "peak_mib": peak, "loss": loss}
        print(json.dumps(answer), flush=True)


def start(
    contender: str, shape: str, precision: str, threads: int, preload: str, *, root: Path = ROOT
) -> subprocess.Popen | None:
    """A worker of a checkout that has made its first steps, or None when it could not."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "LD_PRELOAD": preload,
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment |= {
        "DS_ACCELERATOR": environment.get("DS_ACCELERATOR", ""),
        "MASTER_PORT": str(20000 + os.getpid() % 20000 + (root != ROOT)),
    }
    if not environment["DS_ACCELERATOR"]:
        del environment["DS_ACCELERATOR"]
    environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(root / "benchmarks/train_step.py"), "--worker", contender, shape, precision, str(threads)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=root,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "ready":
            return process
    print(
        f"{contender} at {shape} {precision} did not start:\n{process.stderr.read()[-1500:]}",
        file=sys.stderr,
    )  # type: ignore[union-attr]
    return None


def ask(process: subprocess.Popen, seconds: float) -> dict[str, float]:
    """One round."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{seconds}\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError("a worker died in mid-round")


def flops_of(shape: str) -> float:
    """FLOPs a token of this shape."""
    from pipeline.config.finetune import FinetuneConfig
    from pipeline.config.model import ModelConfig
    from pipeline.planning.flops import flops_per_token

    layers, width, heads, seq, _, vocab = SHAPES[shape]
    model = ModelConfig(
        name=shape, num_layers=layers, hidden_size=width, num_attention_heads=heads, max_seq_len=seq
    )
    return flops_per_token(model, FinetuneConfig(), vocab_size=vocab, seq_len=seq)


def compare(
    shape: str,
    precision: str,
    names: list[str],
    *,
    rounds: int,
    seconds: float,
    threads: int,
    preload: str,
    against: Path | None,
) -> list[str]:
    """Rows of the table for one shape and precision; what ours gained over `against` stands below."""
    processes = {name: start(name, shape, precision, threads, preload) for name in [*names, "gemm"]}
    if against:
        processes[THERE] = start("ours", shape, precision, threads, preload, root=against)
    alive = {name: process for name, process in processes.items() if process is not None}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in alive}
    for number in range(rounds):
        for name in list(alive)[:: -1 if number % 2 else 1]:
            results[name].append(ask(alive[name], seconds))
    for process in alive.values():
        process.kill()
    ceiling = statistics.median(r["flops"] for r in results.pop("gemm"))
    rows = []
    for name, answers in results.items():
        rate = statistics.median(a["tokens_per_s"] for a in answers)
        ratio = statistics.median(
            a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(answers, results["eager"])
        )
        share = rate * flops_of(shape) / ceiling
        rows.append(
            f"| {shape} | {precision} | {name} | {rate:,.0f} | {ratio:.2f} | {share:.0%} | "
            f"{answers[-1]['peak_mib']:,.0f} |"
        )
    if against:
        pairs = zip(results["ours"], results[THERE], strict=True)
        found = [here["tokens_per_s"] / there["tokens_per_s"] for here, there in pairs]
        rows.append(
            f"| {shape} | {precision} | ours here / there | | {statistics.median(found):.3f} "
            f"({min(found):.3f}-{max(found):.3f}) | | |"
        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small", "medium", "large"])
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"]
    )
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="length of one contender's round"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--allocator",
        choices=("auto", "default"),
        default="auto",
        help="auto: tcmalloc where it is found",
    )
    parser.add_argument(
        "--against", type=Path, help="another checkout, such as a git worktree of an older commit"
    )
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        contender, shape, precision, threads = options.worker
        worker(contender, shape, precision, int(threads))
        return
    found = ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")
    preload = (found or "") if options.allocator == "auto" else ""
    names = ["eager", *(name for name in options.contenders if name != "eager")]
    print(
        f"threads {options.threads}, allocator {preload or 'default'}, {options.rounds} rounds of {options.seconds} s\n"
    )
    print(
        "| shape | precision | contender | tokens/s | ratio to eager | share of matmul ceiling | peak MiB |"
    )
    print("|---|---|---|---|---|---|---|")
    for shape in options.shapes:
        for precision in options.precisions:
            rows = compare(
                shape,
                precision,
                names,
                rounds=options.rounds,
                seconds=options.seconds,
                threads=options.threads,
                preload=preload,
                against=options.against and options.against.resolve(),
            )
            print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
