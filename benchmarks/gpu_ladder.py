"""Model FLOPs utilisation of one device over a ladder of sizes, in bf16.

    python benchmarks/gpu_ladder.py                     125M (seq 1024), 350M, 1.3B, 7B (seq 2048) on one CUDA device
    python benchmarks/gpu_ladder.py --rungs tiny        the same code on a CPU, to see that it runs

Each rung trains in a process of its own, so that none inherits memory. MFU counts the model's own arithmetic (PaLM,
arXiv:2204.02311, appendix B) over the datasheet's peak, and over what 8192 x 8192 bf16 products reach on this device.
"""

from __future__ import annotations

import sys
from pathlib import Path

# benchmarks/tokenize.py has the name of a module of the standard library: this folder must not be searched.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"]

import argparse  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Any  # noqa: E402


@dataclass(frozen=True)
class Rung:
    """One size of the ladder."""

    preset: str
    seq_len: int
    micro_batch_size: int
    num_micro_batches: int
    settings: tuple[str, ...] = ()


RUNGS = {
    "125m": Rung("gpt3-125m", 1024, 32, 4),
    "350m": Rung("gpt3-350m", 2048, 16, 4),
    "1.3b": Rung("gpt3-1.3b", 2048, 8, 8),
    # Weights, gradients and Adam's moments take 124 of an H200's 140 GiB: half the blocks are kept.
    "7b": Rung("modern-7b", 2048, 1, 16, ("training.recompute=full", "training.recompute_every=2")),
    # The same matrices for 80 GB: half the layers take 61 GiB.
    "7b-half": Rung("modern-7b", 2048, 1, 16, ("training.recompute=full", "model.num_layers=15")),
    "1.3b-recomputed": Rung("gpt3-1.3b", 2048, 16, 4, ("training.recompute=full",)),
    "tiny": Rung("tiny", 64, 4, 2),
}


def settings_of(name: str, compile_blocks: bool) -> list[str]:
    """The rung's overrides of the defaults."""
    rung = RUNGS[name]
    batch = rung.micro_batch_size * rung.num_micro_batches
    return [
        f"model={rung.preset}", "data.path=none", "training.precision=bf16", f"training.seq_len={rung.seq_len}",
        f"training.micro_batch_size={rung.micro_batch_size}", f"training.global_batch_size={batch}",
        "schedule.warmup_steps=0", f"model.compile={str(compile_blocks).lower()}", *rung.settings,
    ]  # fmt: skip


def random_batches(rung: Rung, vocab_size: int, device: Any) -> list[Any]:
    """The micro-batches of a step, of random tokens."""
    from types import SimpleNamespace

    import torch

    batches: list[Any] = []
    for _ in range(rung.num_micro_batches):
        ids = torch.randint(0, vocab_size, (rung.micro_batch_size, rung.seq_len + 1), device=device)
        batches.append(
            SimpleNamespace(
                tokens=ids[:, :-1].contiguous(),
                labels=ids[:, 1:].contiguous(),
                loss_mask=None,
                document_ids=None,
                positions=None,
                images=None,
                patch_ids=None,
            )
        )
    return batches


def measure(name: str, steps: int, compile_blocks: bool) -> dict[str, Any]:
    """Tokens/s, memory and FLOPs of one rung on this process's device."""
    import torch

    from pipeline import cli
    from pipeline.config.pretrain import PretrainConfig
    from pipeline.config.run_shape import derive
    from pipeline.distributed.layout import connect
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.planning.flops import flops_per_token, num_parameters, peak_tflops
    from pipeline.training.build import build_engine

    rung, vocab_size = RUNGS[name], 50257 if name != "tiny" else 512
    cfg = cli.compose(PretrainConfig, settings_of(name, compile_blocks), config="pretrain")
    shape = derive(cfg, world_size=1, tokenizer_vocab_size=vocab_size)
    layout = connect(ranks_from_environment(), shape.sizes)
    engine, device = build_engine(cfg, shape, layout), layout.device
    on_cuda = device.type == "cuda"
    for number in range(3 + steps):
        if number == 3:  # the first steps allocate and compile
            if on_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
        loss = engine.train_step(random_batches(rung, vocab_size, device), step=number).loss
    if on_cuda:
        torch.cuda.synchronize()
    tokens_per_s = steps * shape.at(0).tokens / (time.perf_counter() - start)
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None
    if on_cuda:
        print(
            kernels_of(
                lambda: engine.train_step(random_batches(rung, vocab_size, device), step=number)
            )
        )
    achieved = tokens_per_s * flops_per_token(
        cfg.model, cfg.finetune, vocab_size=shape.vocab_size, seq_len=rung.seq_len
    )
    return {
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "parameters": num_parameters(cfg.model, shape.vocab_size),
        "tokens_per_s": tokens_per_s,
        "tflops": achieved / 1e12,
        "datasheet_tflops": peak_tflops(torch.cuda.get_device_name()) if on_cuda else None,
        # A CPU without bf16 products makes 1 GFLOP/s: 50 products of 1024 would take two minutes.
        "gemm_tflops": gemm_tflops(device, 8192 if on_cuda else 256),
        "peak_gib": peak_gib,
        "loss": float(loss),
    }


def kernels_of(step: Callable[[], Any]) -> str:
    """What the device did in a step: its kernels by time, and the host's waits and launches."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()  # one of the waits below is this one
    events = seen.key_averages()
    kernels = sorted(
        (
            (e.self_device_time_total / 1e3, e.count, e.key)
            for e in events
            if e.self_device_time_total
        ),
        reverse=True,
    )
    total = sum(ms for ms, _, _ in kernels)
    lines = [f"device busy {total:.1f} ms"]
    lines += [
        f"{ms:9.2f} ms {ms / total:6.1%} {count:6} x {name[:110]}"
        for ms, count, name in kernels[:45]
    ]
    host = {e.key: e.count for e in events if "Synchronize" in e.key or "aunchKernel" in e.key}
    return "\n".join([*lines, f"host: {json.dumps(host)}"])


def gemm_tflops(device: Any, size: int) -> float:
    """TFLOP/s of square bf16 products, best of five rounds."""
    import torch

    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 10 * 2 * size**3 / (time.perf_counter() - start) / 1e12)
    return best


def main() -> None:
    """Print a Markdown table, a row a rung."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=["125m", "350m", "1.3b", "7b"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    parser.add_argument("--one", choices=RUNGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.steps, options.compile)))
        return
    print(
        "| rung | parameters | tokens/s | TFLOP/s | MFU of datasheet | of measured GEMM | peak GiB | device |"
    )
    print("|---|---|---|---|---|---|---|---|")
    failed = False
    for name in options.rungs:
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--one",
            name,
            "--steps",
            str(options.steps),
        ]
        done = subprocess.run(
            command + ["--compile"] * options.compile,
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        if done.returncode:
            print(f"| {name} | failed: {done.stderr.strip().splitlines()[-1]} |" + " |" * 6)
            failed = True
            continue
        r = json.loads(done.stdout.strip().splitlines()[-1])
        datasheet = f"{r['tflops'] / r['datasheet_tflops']:.1%}" if r["datasheet_tflops"] else "-"
        memory = f"{r['peak_gib']:.1f}" if r["peak_gib"] else "-"
        print(
            f"| {name} | {r['parameters']:,} | {r['tokens_per_s']:,.0f} | {r['tflops']:.3g} | {datasheet} | "
            f"{r['tflops'] / r['gemm_tflops']:.1%} | {memory} | {r['device']} |",
            flush=True,
        )
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
