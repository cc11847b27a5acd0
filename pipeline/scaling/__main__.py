"""What loss will a run reach? Told by a ladder of small ones, before it is made.

    python -m pipeline.scaling ladder=quickstart                 make its runs, fit, predict
    python -m pipeline.scaling ladder=quickstart target=large    then make that run
    python -m pipeline.scaling ladder=quickstart run=false       fit the runs that are done
    sbatch --array=0-10 launch/ladder.slurm ladder=quickstart    the runs as a Slurm array

    conf/ladder/NAME.yaml -> runs/NAME/SIZE-TOKENS/ -> L(N, D) -> card.md, curves.png, and
    prediction.json in the folder of each target, which pipeline.report draws its run over

A run that is done is not made again. Ladders are conf/ladder/*.yaml; docs/scaling.md has one, what
it predicted, and what came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import cli, log
from pipeline.errors import ConfigError, DataError
from pipeline.files import write_durably
from pipeline.planning.flops import num_parameters
from pipeline.scaling import card, runs
from pipeline.scaling.ladder import (
    LadderConfig,
    Rung,
    lay_out,
    lay_out_targets,
    settings_of,
    too_few,
)
from pipeline.scaling.law import DELTA, Fit, fit
from pipeline.scaling.prediction import FILE, Prediction, predict


@dataclass
class ScalingConfig:
    """A ladder, how its runs are made, and how the law is fitted."""

    ladder: LadderConfig = field(default_factory=LadderConfig)
    processes: int = 1
    """Processes of each run on this machine: its devices."""
    run: bool = True
    """Make the runs that are not done; false: fit those that are."""
    rung: int | None = None
    """Make this run only, by its number in the table, and fit nothing: a task of a Slurm array."""
    target: str | None = None
    """Make this target's run, once its prediction is written."""
    held_out: str | None = None
    """Name of the dataset whose loss is fitted; null: the only one."""
    budget: float | None = None
    """Operations, 6 N D: print the N and D of least loss for them."""
    delta: float = DELTA
    """Of Huber's loss on residuals of log L."""
    draws: int = 1000
    """Draws of the bootstrap."""
    level: float = 0.9
    """Probability of the intervals."""


def main(cfg: ScalingConfig) -> None:
    """Make what is missing, fit, and write what is predicted.

    Raises:
        ConfigError: the ladder or a setting is not legal.
        DataError: runs are missing, or do not go together.
        MachineError: a run ended early.
    """
    rungs, targets = _lay_out(cfg)
    if cfg.run or cfg.rung is not None or cfg.target is not None:
        runs.check_can_make(processes=cfg.processes)
    if cfg.rung is not None:
        _make_one(cfg, rungs)
        return
    if cfg.run:
        for rung in rungs:
            if not runs.is_done(rung):
                log.say(f"{rung.name}: {rung.parameters:,} parameters, {rung.tokens:,} tokens")
                runs.make(rung, processes=cfg.processes)
    done = [rung for rung in rungs if runs.is_done(rung)]
    if problems := [*too_few(done)]:
        names = ", ".join(rung.name for rung in rungs if rung not in done)
        raise DataError("\n".join([*problems, f"Not done: {names}."]))
    found = [runs.read(rung, held_out=cfg.held_out) for rung in done]
    runs.check_same_data(found)
    law = _fit(cfg, found)
    asked = (_write_prediction(cfg, law, found, target) for target in targets)
    predictions = [prediction for prediction in asked if prediction is not None]
    folder = Path(cfg.ladder.runs_dir) / cfg.ladder.name
    seq_len = rungs[0].shape.seq_len
    lines = [
        *card.lines(
            cfg.ladder, law, found, predictions, seq_len=seq_len, level=cfg.level, budget=cfg.budget
        )
    ]
    write_durably(folder / "curves.png", card.draw(law, found, predictions))
    write_durably(folder / "card.md", "\n".join([*lines, ""]).encode())
    print("\n".join(lines))
    if cfg.target is not None:
        target = next(target for target in targets if target.name == cfg.target)
        if not runs.is_done(target):
            runs.make(target, processes=cfg.processes)


def _lay_out(cfg: ScalingConfig) -> tuple[list[Rung], list[Rung]]:
    """The ladder's runs and its targets, legal with the data that they are to read."""
    from pipeline.data.datasets import describe

    for name, value, is_legal in (
        ("processes", cfg.processes, cfg.processes >= 1),
        ("delta", cfg.delta, cfg.delta > 0),
        ("draws", cfg.draws, cfg.draws >= 100),
        ("level", cfg.level, 0 < cfg.level < 1),
        ("budget", cfg.budget, cfg.budget is None or cfg.budget > 0),
    ):
        if not is_legal:
            rule = {"processes": "at least 1", "draws": "at least 100", "level": "between 0 and 1"}
            raise ConfigError(f"{name} ({value}) must be {rule.get(name, 'above 0')}.")
    if cfg.target is not None and cfg.target not in cfg.ladder.targets:
        known = ", ".join(cfg.ladder.targets) or "none"
        raise ConfigError(f"target={cfg.target}: the ladder has no such target. It has: {known}.")
    data = describe(settings_of(cfg.ladder).data)
    given = {"world_size": cfg.processes, "vocab_size": data.vocab_size}
    rungs = lay_out(cfg.ladder, **given)
    return rungs, lay_out_targets(cfg.ladder, rungs, **given)


def _make_one(cfg: ScalingConfig, rungs: Sequence[Rung]) -> None:
    """Make the run of an array's task."""
    assert cfg.rung is not None
    if not 0 <= cfg.rung < len(rungs):
        raise ConfigError(
            f"rung ({cfg.rung}) must be between 0 and {len(rungs) - 1}: the ladder "
            f"{cfg.ladder.name} has {len(rungs)} runs (sbatch --array=0-{len(rungs) - 1})."
        )
    if not runs.is_done(rungs[cfg.rung]):
        runs.make(rungs[cfg.rung], processes=cfg.processes)


def _fit(cfg: ScalingConfig, found: Sequence[runs.Run]) -> Fit:
    """The law of the runs.

    Raises:
        DataError: losses do not fall with size, or not with tokens.
    """
    import numpy as np

    columns = [[run.parameters for run in found], [run.tokens for run in found]]
    parameters, tokens = (np.array(column, float) for column in columns)
    losses = np.array([run.loss for run in found])
    law = fit(parameters, tokens, losses, delta=cfg.delta, num_draws=cfg.draws)
    if not law.law.is_falling:
        raise DataError(
            f"the losses of these runs do not fall with size and tokens (alpha {law.law.alpha:.3f},"
            f" beta {law.law.beta:.3f}): no law of this form holds them. Is the learning rate right"
            " for all sizes (model.init=mup, or ladder.lr)? Are the runs long enough to leave the "
            "first plateau?"
        )
    return law


def _write_prediction(
    cfg: ScalingConfig, law: Fit, found: Sequence[runs.Run], target: Rung
) -> Prediction | None:
    """The target's prediction, in its folder; of a run that has begun the one from before, or None.

    What is said with the result in sight is no prediction.
    """
    folder = runs.run_dir(target)
    if (folder / "metrics.jsonl").exists():
        if (written := Prediction.load(folder)) is None:
            log.say(f"{folder} has begun without a prediction, so none is made of it.")
        return written
    prediction = predict(
        law,
        found,
        target,
        ladder=cfg.ladder.name,
        num_parameters=num_parameters(target.cfg.model, target.shape.vocab_size),
        level=cfg.level,
    )
    write_durably(folder / FILE, prediction.to_json())
    return prediction


if __name__ == "__main__":
    cli.run(main, ScalingConfig, config="scaling")
