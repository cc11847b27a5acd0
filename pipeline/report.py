"""Draw a run: loss, learning rate, gradient norm and throughput, on one web page.

    python -m pipeline.report runs/NAME

    runs/NAME/metrics.jsonl --History--> runs/NAME/report/curves.png, runs/NAME/report/index.html

Works on a running or killed run too: it reads what is there. An evaluation that pipeline.evaluate
left in the run (output=runs/NAME/evaluation.json) is shown beside the evaluations of the training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from pipeline import cli
from pipeline.errors import MachineError
from pipeline.files import write_durably
from pipeline.tracking.history import History
from pipeline.tracking.report_page import PROFILES, draw, page


@dataclass
class ReportConfig:
    """What is drawn."""

    run: str = MISSING
    """Run folder, runs/NAME."""


def main(cfg: ReportConfig) -> None:
    """Write report/curves.png and report/index.html into the run folder."""
    run_dir = Path(cfg.run)
    history = History.load(run_dir)
    folder = run_dir / "report"
    for path in (folder, folder / "curves.png", folder / "index.html"):
        if path.is_symlink():
            raise MachineError(
                f"{path} is a link; the report is written into the run's own folder only. Take the "
                "link away."
            )
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder} cannot be made: {error.strerror}.") from None
    picture = draw(history, title=run_dir.resolve().name)
    write_durably(folder / "curves.png", picture)
    text = page(history, run_dir, picture)
    write_durably(folder / "index.html", text.encode(errors="backslashreplace"))
    # The evaluations during training may have seen a part of the dataset; pipeline.evaluate saw all
    # of it.
    during = {name: rows for name, rows in history.evaluations.items() if name not in history.final}
    scores = [(name, f"step {rows[-1]['step']}", rows[-1]) for name, rows in during.items()]
    scores += [(name, f"{row['tokens']:,} tokens", row) for name, row in history.final.items()]
    for name, where, row in scores:
        values = f"loss {row['loss']:.4f}, {row['bits_per_byte']:.4f} bits per byte"
        if row.get("exact") is not None:
            values += f", {row['exact']:.1f} % of answers exact"
        print(f"{'held out':14} {values}  ({name}, {where})")
    print(f"{'speed':14} {history.tokens_per_sec:,.0f} tokens/s")
    places = {
        "curves": folder / "curves.png",
        "page": folder / "index.html",
        "numbers": run_dir / "metrics.jsonl",
    }
    places |= {"checkpoints": run_dir / "checkpoints", "W&B, offline": run_dir / "wandb"}
    places |= {"profiles": run_dir / PROFILES}
    for what, place in places.items():
        if place.exists():
            print(f"{what:14} {place}")


if __name__ == "__main__":
    cli.run(main, ReportConfig, config="report", positional=["run"])
