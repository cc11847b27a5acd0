"""Held-out loss of Muon and AdamW at equal tokens: the quickstart's model and data, each at several learning rates.

    python -m benchmarks.muon [--steps 300] [--rates 0.002 0.004 0.008 0.016] [--data data/quickstart]

The same model, batches, schedule and decay; what differs is `optimizer=` and the learning rate. Each run is one process of
one thread. CPU seconds are those of the whole process, its start and its evaluations included. The data are those of
`make quickstart`: Python's own standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

RATES = (2e-3, 4e-3, 8e-3, 16e-3)
OPTIMIZERS = ("adamw", "muon")
TOKENS_A_STEP = 4 * 256


def call(*words: str) -> float:
    """Run a command of this repository in one thread; its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *words], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def prepare(folder: Path) -> Path:
    """The tokens of launch/quickstart.sh; made where they are not there."""
    tokens, tokenizer = folder / "tokens", folder / "tokenizer.json"
    if not (tokens / "validation" / "manifest.json").exists():
        corpus = [
            f"input=stdlib={sysconfig.get_path('stdlib')}", "include=.py", "on_error=quarantine",
            "exclude=*/site-packages/*,*/dist-packages/*",
        ]  # fmt: skip
        call("data_prep.train_tokenizer", *corpus, f"output={tokenizer}", "vocab_size=2048")
        split = ["validation_fraction=0.02", f"tokenizer={tokenizer}"]
        call("data_prep.tokenize", *corpus, f"output={tokens}", *split)
    return tokens


def held_out(
    runs: Path, tokens: Path, *, optimizer: str, lr: float, steps: int
) -> tuple[float, float]:
    """(loss on held-out text, CPU seconds) of a run."""
    name = f"{optimizer}-{lr}"
    seconds = call(
        "pipeline.train", "experiment=quickstart", f"name={name}", f"runs_dir={runs}", f"data.path={tokens}",
        f"optimizer={optimizer}", f"optimizer.lr={lr}", f"training.total_steps={steps}", "schedule.warmup_steps=30",
        "training.eval_every=0", "training.eval_sequences=128", "tracking.wandb=disabled", "tracking.log_every=50", "checkpoint.save_every=0",
    )  # fmt: skip
    rows = map(json.loads, (runs / name / "metrics.jsonl").read_text().splitlines())
    return [row["val/validation/loss"] for row in rows if "val/validation/loss" in row][-1], seconds


def main() -> None:
    """Print a table, a row a learning rate, and who wins."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="made if absent")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates")
    given = parser.parse_args()
    tokens = prepare(given.data)
    best = dict.fromkeys(OPTIMIZERS, float("inf"))
    print(
        f"Held-out loss after {given.steps} steps of {TOKENS_A_STEP} tokens, 1.3 M parameters, fp32.\n"
    )
    print("| learning rate | AdamW | Muon | AdamW, CPU s | Muon, CPU s |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for lr in given.rates:
            found = {
                o: held_out(Path(folder), tokens, optimizer=o, lr=lr, steps=given.steps)
                for o in OPTIMIZERS
            }
            best = {o: min(best[o], found[o][0]) for o in OPTIMIZERS}
            losses, seconds = zip(*found.values())
            cells = [f"{lr:g}", *(f"{x:.4f}" for x in losses), *(f"{x:.0f}" for x in seconds)]
            print(f"| {' | '.join(cells)} |", flush=True)
    winner = min(best, key=lambda optimizer: best[optimizer])
    gap = max(best.values()) - min(best.values())
    print(f"\nBest of each: {best['adamw']:.4f} and {best['muon']:.4f}; {winner} by {gap:.4f}.")


if __name__ == "__main__":
    main()
