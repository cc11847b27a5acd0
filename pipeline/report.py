"""Draw a run, or several on one page: curves, evaluations, samples, settings.

    python -m pipeline.report runs/NAME
    python -m pipeline.report runs/NAME beside=[runs/OTHER,runs/THIRD]

    runs/NAME/metrics.jsonl --History--> runs/NAME/report/curves.png, runs/NAME/report/index.html

Works on a running or killed run too: it reads what is there. An evaluation that pipeline.evaluate
left in the run (output=runs/NAME/evaluation.json) is shown beside the evaluations of the training.
What pipeline.scaling predicted of the run (runs/NAME/prediction.json) is drawn under its loss, and
leaving it is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from pipeline import cli, log
from pipeline.errors import ConfigError, MachineError
from pipeline.files import write_durably
from pipeline.scaling.prediction import Prediction
from pipeline.tracking.curves import Band, draw
from pipeline.tracking.history import History
from pipeline.tracking.report_page import PROFILES, page
from pipeline.tracking.samples import read_samples


@dataclass
class ReportConfig:
    """What is drawn."""

    run: str = MISSING
    """Run folder, runs/NAME."""
    beside: list[str] = field(default_factory=list)
    """Folders of other runs, drawn on the same page: their curves, and which settings differ."""


def main(cfg: ReportConfig) -> None:
    """Write report/curves.png and report/index.html into the run folder."""
    run_dir = Path(cfg.run)
    runs = _runs([run_dir, *map(Path, cfg.beside)])
    (_, history), *_ = runs.values()
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
        raise MachineError(
            f"{folder} cannot be made: {error.strerror}. A report is written into the run's own "
            "folder: choose another, with copies of its *.jsonl, *.json and config.yaml."
        ) from None
    prediction = Prediction.load(run_dir)
    remarks = [*_remarks(prediction, history)] if prediction else []
    for remark in remarks:
        log.say(remark)
    band = _band(prediction, history) if prediction else None
    samples = read_samples(run_dir)
    histories = {name: found for name, (_, found) in runs.items()}
    pictures = draw(histories, title=", ".join(runs), band=band)
    write_durably(folder / "curves.png", pictures.sheet)
    text = page(runs, pictures, samples=samples, remarks=remarks)
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
    places |= {"TensorBoard": run_dir / "tensorboard", "profiles": run_dir / PROFILES}
    for what, place in places.items():
        if place.exists():
            print(f"{what:14} {place}")


def _runs(folders: list[Path]) -> dict[str, tuple[Path, History]]:
    """Name to folder and history; two runs of one name get the folder they lie in before it.

    Raises:
        ConfigError: a run is named twice.
        DataError: a folder is none of a run.
    """
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise ConfigError(f"beside: a run is named twice ({', '.join(map(str, folders))}).")
    names = [place.name for place in places]
    long = len(set(names)) < len(names)
    return {
        f"{place.parent.name}/{name}" if long else name: (folder, History.load(folder))
        for folder, place, name in zip(folders, places, names, strict=True)
    }


def _remarks(prediction: Prediction, history: History) -> Iterator[str]:
    """What was predicted, and where the run is outside of it."""
    yield (
        f"Predicted by {prediction.ladder}: held-out loss {prediction.loss:.4f} "
        f"({prediction.low:.4f} to {prediction.high:.4f}, {prediction.level:.0%})"
    )
    yield from (f"warning: {miss}" for miss in prediction.misses(history))


def _band(prediction: Prediction, history: History) -> Band:
    """The prediction by step: what is logged says how many tokens a step has."""
    per_token = history.steps[-1]["step"] / max(1, history.steps[-1]["tokens"])
    end = per_token * prediction.tokens
    return Band(
        steps=[row["part"] * end for row in prediction.course],
        low=[row["low"] for row in prediction.course],
        high=[row["high"] for row in prediction.course],
        end=end,
        loss=prediction.loss,
        interval=(prediction.low, prediction.high),
    )


if __name__ == "__main__":
    cli.run(main, ReportConfig, config="report", positional=["run"])
