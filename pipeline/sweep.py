"""Train at every combination of settings with several values, one run after another.

    python -m pipeline.sweep name=lr data.path=data/corpus optimizer.lr=1e-3,3e-4 seed=1,2
    python -m pipeline.sweep name=size data.path=data/corpus 'model=glob(gpt2-*)' seed=1
    sbatch --array=0-3 launch/sweep.slurm data.path=data/corpus optimizer.lr=1e-3,3e-4 seed=1,2

    settings --Hydra's sweeper grammar--> runs/SWEEP/NNN-SETTINGS/ --> table.md, curves.png

`pipeline.train --multirun` is the same. What is no setting of the sweep is one of pipeline.train.
A point that fails does not end the others; the table says so, and the same command goes on with
what is not done. All points are checked before the first one is trained.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from pipeline import cli, log
from pipeline.config import rules
from pipeline.config.pretrain import PretrainConfig
from pipeline.errors import EXIT_BUG, ConfigError
from pipeline.files import write_durably
from pipeline.scaling import runs
from pipeline.sweeping.points import Point, points_of
from pipeline.sweeping.table import keep_exit_code, lines, outcome_of
from pipeline.tracking.curves import draw


@dataclass
class SweepConfig:
    """The sweep; every other setting is one of pipeline.train, with one value or several."""

    name: str = "sweep"
    """Name of the sweep: its runs are <runs_dir>/<name>/NNN-..."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    processes: int = 1
    """Processes of each run on this machine: its devices."""
    point: int | None = None
    """Train this point only, by its number: a task of a Slurm array. Null: all."""
    run: bool = True
    """Train the points that are not done; false: only write the table of those that are."""


def main(cfg: SweepConfig, words: Sequence[str]) -> int:
    """Make what is not done, then the table and the curves; 1 where a point is not done.

    Args:
        cfg: the sweep.
        words: settings of pipeline.train.

    Raises:
        ConfigError: a point is not legal; all that is wrong is named.
    """
    points = points_of(words)
    folder = Path(cfg.runs_dir) / cfg.name
    if cfg.processes < 1:
        raise ConfigError(f"processes ({cfg.processes}) must be at least 1.")
    if cfg.point is not None and not 0 <= cfg.point < len(points):
        raise ConfigError(
            f"point ({cfg.point}) must be between 0 and {len(points) - 1}: the sweep has "
            f"{len(points)} points (sbatch --array=0-{len(points) - 1})."
        )
    if problems := [*_problems(points, cfg, folder)]:
        raise ConfigError("\n".join(problems))
    runs.check_can_make(processes=cfg.processes)
    if cfg.point is not None:
        return _train(points[cfg.point], cfg, folder)
    for point in points if cfg.run else []:
        if not (folder / point.name / "DONE").exists():
            log.say(f"point {point.number} of {len(points)}: {point.name}")
            code = _train(point, cfg, folder)
            if code == 0 and not (folder / point.name / "DONE").exists():
                log.say("asked to leave: the same command goes on")
                break
    return _tell(points, folder)


def _words(point: Point, folder: Path) -> list[str]:
    return [*point.words, f"runs_dir={folder}", f"name={point.name}"]


def _problems(points: Sequence[Point], cfg: SweepConfig, folder: Path) -> Iterator[str]:
    """What is wrong with a point, before any of them costs time."""
    for point in points:
        try:
            composed = cli.compose(PretrainConfig, _words(point, folder), config="pretrain")
            rules.check(composed, world_size=cfg.processes, tokenizer_vocab_size=None)
            made = folder / point.name
            if (made / "DONE").exists() and (others := [*_changed(made, composed)]):
                raise ConfigError(
                    f"it is done, with other settings than now: {'; '.join(others)}. Give the "
                    f"sweep another name=..., or delete {made}."
                )
        except ConfigError as error:
            yield f"point {point.number} ({point.name}): {error}"


def _changed(made: Path, cfg: PretrainConfig) -> Iterator[str]:
    """What of the settings of a point that is done, and of what it read, is not as it was."""
    if not (made / "config.yaml").exists():
        return  # who took it away will know
    yield from runs.changed(made, cfg, (*runs.COMPARED, "data"))


def _train(point: Point, cfg: SweepConfig, folder: Path) -> int:
    """Train a point here to its end; the exit code, which is kept for the table."""
    code = runs.launch(_words(point, folder), processes=cfg.processes)
    keep_exit_code(folder, point, code)
    if code:
        log.say(f"point {point.number} ended with exit code {code}; the others go on")
    return code


def _tell(points: Sequence[Point], folder: Path) -> int:
    """Write and print what came of the points."""
    outcomes = [outcome_of(folder, point) for point in points]
    text = "\n".join(lines(outcomes))
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / "table.md", f"{text}\n".encode())
    histories = {o.point.name: o.history for o in outcomes if o.history is not None}
    if histories:
        write_durably(folder / "curves.png", draw(histories, title=folder.name).sheet)
        print(f"curves: {folder / 'curves.png'}")
    return 0 if all(outcome.is_done for outcome in outcomes) else EXIT_BUG


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words of a command line: the sweep's own, and those of pipeline.train."""
    own = {field.name for field in fields(SweepConfig)} | {"-h", "--help", "--cfg"}
    is_own = [word.partition("=")[0] in own for word in words]
    return (
        [word for word, ours in zip(words, is_own) if ours],
        [word for word, ours in zip(words, is_own) if not ours],
    )


def run(words: Sequence[str]) -> None:
    """Exit with the code of the sweep that the words of a command line ask for."""
    sys.argv[1:], theirs = split_words(words)

    def sweep(cfg: SweepConfig) -> int:
        return main(cfg, theirs)

    cli.run(sweep, SweepConfig, config="sweep")


if __name__ == "__main__":
    run(sys.argv[1:])
