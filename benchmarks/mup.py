"""Does the best learning rate of a narrow model stay the best of one 4 and 8 times as wide? muP beside the standard way.

    python -m benchmarks.mup [--steps 600] [--data data/quickstart] [--plot docs/mup.png]

Models of two blocks and widths 16, 64 and 128 on the quickstart's data, `model.init=mup` with 16 as its base width and
`model.init=scaled`, at learning rates a factor of two apart (arXiv:2203.03466, figure 1). Everything else is the same, decay
of the rate included. A run that is done in `--runs` is not made again. Each is one process of one thread, `--processes` of
them at a time.
"""

from __future__ import annotations

import sys
from pathlib import Path

# benchmarks/tokenize.py has the name of a module of the standard library: this folder must not be searched.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"]

import argparse  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402

from benchmarks.muon import call, prepare  # noqa: E402

INITS = ("mup", "scaled")
WIDTHS = (16, 64, 128)
RATES = tuple(0.0025 * 2**k for k in range(8))
HEAD_DIM = 8

Losses = dict[tuple[str, int, float], float]


def held_out(runs: Path, tokens: Path, *, init: str, width: int, lr: float, steps: int) -> float:
    """Held-out loss of a run, nats a token; made unless it is there."""
    name = f"{init}-{width}-{lr:g}-{steps}"
    metrics = runs / name / "metrics.jsonl"
    if not metrics.exists() or "val/validation/loss" not in metrics.read_text():
        call(
            "pipeline.train", f"name={name}", f"runs_dir={runs}", f"data.path={tokens}", "model=tiny", "model.num_layers=2",
            "model.position=rope", "model.normalization=rmsnorm", "model.bias=false", f"model.head_dim={HEAD_DIM}",
            f"model.init={init}", f"model.mup_base_hidden_size={WIDTHS[0]}", f"model.hidden_size={width}",
            f"model.num_attention_heads={width // HEAD_DIM}", f"optimizer.lr={lr:g}", "schedule=linear",
            f"schedule.warmup_steps={steps // 20}", f"training.total_steps={steps}", "training.precision=fp32", "training.seq_len=64",
            "training.global_batch_size=8", "training.micro_batch_size=8", "training.eval_every=0", "training.eval_sequences=2048",
            "checkpoint.save_every=0", "tracking=local", "tracking.log_every=100",
        )  # fmt: skip
    rows = map(json.loads, metrics.read_text().splitlines())
    return [row["val/validation/loss"] for row in rows if "val/validation/loss" in row][-1]


def best_rate(losses: Losses, init: str, width: int) -> float:
    """The learning rate of the least loss."""
    return min(RATES, key=lambda lr: losses[init, width, lr])


def table(losses: Losses) -> str:
    """A row a learning rate, a column a width and kind; the best of each column in bold, and how far it moved."""
    columns = list(itertools.product(INITS, WIDTHS))
    lines = ["| learning rate | " + " | ".join(f"{i} {w}" for i, w in columns) + " |"]
    lines += ["|---" * (len(columns) + 1) + "|"]
    for lr in RATES:
        cells = [
            f"**{losses[i, w, lr]:.3f}**" if lr == best_rate(losses, i, w) else f"{losses[i, w, lr]:.3f}" for i, w in columns
        ]  # fmt: skip
        lines += [f"| {lr:g} | " + " | ".join(cells) + " |"]
    for init in INITS:
        narrow, *wider = (best_rate(losses, init, width) for width in WIDTHS)
        moved = ", ".join(
            f"{math.log2(lr / narrow):+.0f} at {width // WIDTHS[0]} times the width"
            for lr, width in zip(wider, WIDTHS[1:], strict=True)
        )
        lines += ["", f"{init}: the best rate moves by factors of two: {moved}."]
    return "\n".join(lines)


def draw(losses: Losses, path: Path) -> None:
    """A panel for each way, a curve for each width, a ring around its best."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(INITS), sharey=True)
    for panel, init, title in zip(panels, INITS, ("muP", "standard"), strict=True):
        for width, colour in zip(WIDTHS, ("#9ecae1", "#4292c6", "#08306b"), strict=True):
            curve = [losses[init, width, lr] for lr in RATES]
            panel.plot(RATES, curve, "o-", ms=3, color=colour, label=f"width {width}")
            best = best_rate(losses, init, width)
            panel.plot([best], [losses[init, width, best]], "o", ms=9, mfc="none", color=colour)
        panel.set_xscale("log", base=2)
        panel.set_xticks(RATES, [f"{lr:g}" for lr in RATES], rotation=45)
        panel.set(title=title, xlabel="learning rate")
    panels[0].set_ylabel("held-out loss, nats per token")
    panels[0].legend()
    FigureCanvasAgg(figure).print_figure(path, dpi=110)


def main() -> None:
    """Make the runs; print the table, and draw it when asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of 512 tokens")
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="made if absent")
    parser.add_argument("--runs", type=Path, default=Path("runs/mup"), help="the runs' folder")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--plot", type=Path, help="a PNG file")
    given = parser.parse_args()
    tokens = prepare(given.data)
    # The widest first: they take longest.
    keys = list(itertools.product(INITS, reversed(WIDTHS), RATES))

    def loss_of(key: tuple[str, int, float]) -> float:
        init, width, lr = key
        return held_out(given.runs, tokens, init=init, width=width, lr=lr, steps=given.steps)

    with ThreadPoolExecutor(given.processes) as pool:
        losses: Losses = dict(zip(keys, pool.map(loss_of, keys), strict=True))
    print(table(losses))
    if given.plot:
        draw(losses, given.plot)


if __name__ == "__main__":
    main()
