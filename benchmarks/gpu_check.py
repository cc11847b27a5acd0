"""The first minutes on a GPU: does everything run there, how fast, within a budget of seconds; the table comes last.

    python benchmarks/gpu_check.py                        460 s of one device
    python benchmarks/gpu_check.py --stages smoke 125m    some stages
    python benchmarks/gpu_check.py --cpu --out /tmp/check the same code at tiny sizes, to see that it runs

Each stage is a process with a limit of its own; what it prints last is its result. Those that ask whether it runs go
beside each other, those that ask how fast alone. The folder has table.md, a line of results.jsonl a stage, and log.txt
with all that was printed. Sizes whose states do not fit the device are not tried.
"""

from __future__ import annotations

import sys
from pathlib import Path

# benchmarks/tokenize.py has the name of a module of the standard library: this folder must not be searched.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"]

import argparse  # noqa: E402
import importlib.metadata  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Any  # noqa: E402

LEAST_S = 20  # a stage that would get less is not begun
CPU_SCALE = 10  # of the stages' limits, which are a device's
VERSIONS = ("torch", "transformers", "numpy", "deepspeed", "megatron-core")
TESTS = (
    "tests/engine/test_host_waits.py", "tests/data/test_loader.py", "tests/model/test_documents.py",
)  # fmt: skip
RUN = (
    "model=tiny", "tracking=local", "training.global_batch_size=8", "training.micro_batch_size=4",
    "training.seq_len=64", "training.precision=bf16", "training.eval_every=0", "training.eval_sequences=16",
    "tracking.log_every=1", "schedule.warmup_steps=2", "checkpoint.save_every=0",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One thing that is tried."""

    name: str
    limit_s: int
    command: tuple[str, ...]
    least_gib: int = 0
    """Memory of a device below which it is left out."""
    beside: bool = False
    """Runs beside its neighbours that do: nothing in it is timed."""


def stages(cpu: bool, work: str) -> list[Stage]:
    """What is tried, in order: first whether it runs, then how fast."""

    def part(name: str) -> tuple[str, ...]:
        return (str(Path(__file__).resolve()), "--part", name, "--work", f"{work}/{name}")

    def rung(name: str, *more: str) -> tuple[str, ...]:
        return ("benchmarks/gpu_ladder.py", "--one", name, "--steps", "2" if cpu else "5", *more)

    def peers(shape: str) -> tuple[str, ...]:
        rounds = ("--rounds", "2", "--seconds", "1" if cpu else "3")
        return ("benchmarks/train_step.py", "--shapes", shape, "--precisions", "bf16", "--contenders", "ours", "ours compiled",
                "compiled", *rounds)  # fmt: skip

    tests = (
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        *TESTS,
    )
    features = ("benchmarks/gpu_features.py", *(("--only", "modern fp32", "lora") if cpu else ()))
    found = [
        Stage("facts", 120, part("facts"), beside=True),
        Stage("smoke", 120, part("smoke"), beside=True),
        Stage("repeat", 180, part("repeat"), beside=True),
        Stage("features", 240, features, beside=True),
        Stage("gpu tests", 180, tests, beside=True),
        Stage("attention", 60, ("benchmarks/gpu_attention.py",)),
    ]
    if cpu:
        return [
            *found,
            Stage("tiny", 90, rung("tiny")),
            Stage("tiny compiled", 120, rung("tiny", "--compile")),
            Stage("peers", 120, peers("small")),
        ]
    # What they took on an H200: 37, 145, 86 and 59 s; what is behind them may not be reached.
    return [
        *found,
        Stage("125m compiled", 110, rung("125m", "--compile")),
        Stage("7b compiled", 180, rung("7b", "--compile"), least_gib=130),
        Stage("7b-half compiled", 150, rung("7b-half", "--compile"), least_gib=70),
        Stage("peers", 120, peers("gpu")),
        *(Stage(f"{name} compiled", 110, rung(name, "--compile")) for name in ("1.3b", "350m")),
        *(Stage(name, 75, rung(name)) for name in ("125m", "350m", "1.3b")),
        Stage("1.3b recomputed", 70, rung("1.3b-recomputed")),
    ]


# ---- what is no program of its own -----------------------------------------------------------------------------------


def facts(_: Path) -> dict[str, Any]:
    """Versions, the device, and how long the imports of a run take."""
    began = time.perf_counter()
    import torch

    import pipeline.training.trainer  # noqa: F401

    values: dict[str, Any] = {name: importlib.metadata.version(name) for name in VERSIONS}
    values |= {
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "device": "cpu",
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        values |= {
            "device": device.name,
            "gib": round(device.total_memory / 2**30, 1),
            "nccl": nccl,
        }
    return values | {"import_s": round(time.perf_counter() - began, 1)}


def data(work: Path) -> Path:
    """A few hundred KB of the standard library, tokenized by our own tools, once."""
    out = work / "data"
    if not (out / "train" / "manifest.json").exists():
        library = Path(json.__file__).resolve().parents[1] / "asyncio"
        corpus, tokenizer = (f"input=stdlib={library}", "include=.py"), work / "tokenizer.json"
        call("-m", "data_prep.train_tokenizer", *corpus, f"output={tokenizer}", "vocab_size=512")
        call(
            "data_prep/tokenize.py",
            *corpus,
            f"output={out}",
            f"tokenizer={tokenizer}",
            "validation_fraction=0.1",
        )
    return out


def call(*words: str) -> None:
    """Run a program of ours; its error ends the stage."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout + done.stderr, flush=True)
    if done.returncode:
        sys.exit(
            f"{' '.join(words[:3])} ended with {done.returncode}: {(done.stderr.strip() or '?').splitlines()[-1]}"
        )


def train(work: Path, name: str, *settings: str) -> Path:
    """A short run of the tiny model; its folder."""
    path, runs = data(work), work / "runs"
    call(
        "-m",
        "pipeline.train",
        *RUN,
        f"name={name}",
        f"runs_dir={runs}",
        f"data.path={path}",
        *settings,
    )
    return runs / name


def smoke(work: Path) -> dict[str, Any]:
    """20 steps, in which the loss falls, on the device that was looked for."""
    rows = [json.loads(line) for line in (train(work, "smoke", "training.total_steps=20", "optimizer.lr=3e-3")
                                          / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
    loss = [row["train/loss"] for row in rows if "train/loss" in row]
    device = next(row["facts"]["device"] for row in rows if row.get("event") == "start")
    if not (len(loss) == 20 and all(map(math.isfinite, loss)) and loss[-1] < loss[0] - 0.3):
        sys.exit(f"the loss does not fall: {loss}")
    return {"device": device, "loss": [round(loss[0], 3), round(loss[-1], 3)]}


def repeat(work: Path) -> dict[str, Any]:
    """Whether two runs, and a resumed and an uninterrupted one, end at the same weights and moments."""
    ten = "training.total_steps=10"
    one, two = train(work, "one", ten), train(work, "two", ten)
    resumed = train(
        work, "resumed", ten, "checkpoint.save_every=5", "checkpoint.asynchronous=false"
    )
    shutil.rmtree(resumed / "checkpoints" / "step-00000010")
    for path in (resumed / "checkpoints" / "latest", resumed / "DONE"):
        path.unlink()
    train(work, "resumed", ten)
    last = "checkpoints/step-00000010"

    def equal(other: Path) -> bool:
        command = [
            sys.executable,
            "-m",
            "pipeline.checkpoint",
            "diff",
            str(one / last),
            str(other / last),
        ]
        return subprocess.run(command, cwd=ROOT).returncode == 0

    found = {"two_runs_bitwise": equal(two), "resumed_bitwise": equal(resumed)}
    if found["two_runs_bitwise"] and not found["resumed_bitwise"]:
        sys.exit("two runs are equal bit by bit, a resumed one is not")
    return found


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "facts": facts,
    "smoke": smoke,
    "repeat": repeat,
}

# ---- the stages, one after the other ---------------------------------------------------------------------------------


def run(stage: Stage, *, limit_s: float, environment: dict[str, str], log: Path) -> dict[str, Any]:
    """One stage: its verdict, seconds, and the last line that it printed."""
    began, verdict = time.monotonic(), "ok"
    command = [sys.executable, "-W", "ignore", *stage.command]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:  # fmt: skip
        try:
            out, errors = process.communicate(timeout=limit_s)
            if process.returncode:
                verdict = f"failed ({process.returncode})"
        except subprocess.TimeoutExpired:
            verdict = "time limit"
            os.killpg(process.pid, 9)
            out, errors = process.communicate()
    with log.open("a") as file:
        file.write(f"== {stage.name}: {verdict}\n{out}\n-- standard error\n{errors[-20000:]}\n")
    lines = [
        line for line in (out if verdict == "ok" else errors or out).splitlines() if line.strip()
    ]
    seconds = round(time.monotonic() - began)
    return {"verdict": verdict, "s": seconds, "result": lines[-1][:400] if lines else ""}


def device_gib() -> float:
    """Memory of the device, asked in another process; 0 where there is none."""
    code = "import torch; print(torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return int(done.stdout or 0) / 2**30


def check(chosen: list[Stage], *, out: Path, budget_s: float, cpu: bool) -> int:
    """Run the stages and print the table; how many did not end well."""
    out.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ, "DS_BUILD_OPS": "0", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    gib, end = (0.0 if cpu else device_gib()), time.monotonic() + budget_s
    rows: list[dict[str, Any]] = []

    def one(stage: Stage) -> dict[str, Any]:
        left = end - time.monotonic()
        limit = min(stage.limit_s * (CPU_SCALE if cpu else 1), left)
        row = {"stage": stage.name, "s": 0, "result": ""}
        if stage.least_gib > gib:
            return row | {"verdict": f"needs {stage.least_gib} GiB"}
        if left < LEAST_S:
            return row | {"verdict": "not reached"}
        print(f"== {stage.name}: {limit:.0f} s at most", file=sys.stderr, flush=True)
        return row | run(stage, limit_s=limit, environment=environment, log=out / "log.txt")

    for is_beside, group in itertools.groupby(chosen, key=lambda stage: stage.beside):
        together = list(group)
        with ThreadPoolExecutor(len(together) if is_beside else 1) as pool:
            for row in pool.map(one, together):
                rows.append(row)
                with (out / "results.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                # After each: whoever ends this, it is there.
                (out / "table.md").write_text(table(rows))
    print(table(rows), end="")
    return sum(row["verdict"].startswith(("failed", "time limit", "not reached")) for row in rows)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row a stage."""
    cells = [
        f"| {r['stage']} | {r['verdict']} | {r['s']} | {r['result'].replace('|', '/')} |\n"
        for r in rows
    ]
    return "".join(["| stage | verdict | s | result |\n", "|---|---|---|---|\n", *cells])


def main() -> None:
    """Run the stages; exit code 1 when one of them did not end well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of the results")
    parser.add_argument("--budget", type=float, default=460, help="seconds for all stages")
    parser.add_argument("--stages", nargs="+", help="names from the table; default: all")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes, no device")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.work)))
        return
    with tempfile.TemporaryDirectory() as work:
        known = {stage.name: stage for stage in stages(options.cpu, work)}
        if unknown := set(options.stages or ()) - set(known):
            parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        chosen = [known[name] for name in options.stages or known]
        failed = check(chosen, out=options.out.resolve(), budget_s=options.budget, cpu=options.cpu)
    sys.exit(int(failed > 0))


if __name__ == "__main__":
    main()
