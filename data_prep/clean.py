"""Keeps the good documents of a corpus and says why each other one went.

    python -m data_prep.clean input='web=crawl/*.jsonl.gz' output=clean clean=fineweb
    python -m data_prep.clean input=src/ output=clean clean=code
    decontaminate.sets='[evals/*.jsonl]' sbatch --array=0-63 launch/clean.slurm input=... output=...

Recipes (clean=NAME) are conf/clean/NAME.yaml: fineweb, c4, gopher, code, dedup. The result is
OUT/documents/<source>/, what went is in OUT/dropped/, counts by step and reason in OUT/report.json
and report.png. Run again after a failure: only what is missing is done. docs/cleaning.md explains
the steps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from data_prep.cleaning.filters import check_packages
from data_prep.cleaning.job import REPORT, job_facts, run_passes
from data_prep.cleaning.recipes import Recipe, passes
from data_prep.cleaning.report import SHAPE, table, write
from data_prep.cleaning.stages import Plan
from data_prep.jobs import JobConfig, close_job, open_job, read_own
from data_prep.sources.inputs import InputConfig, find_units
from pipeline import cli, log

T = TypeVar("T")


@dataclass
class CleanConfig(Recipe, InputConfig, JobConfig):
    """Settings of data_prep.clean."""

    wait_s: float = 60
    """How long a task that has done its share of a pass waits for the others, seconds, before it
    does what they lack: they may be dead, or not started."""


def main(cfg: CleanConfig) -> None:
    """Do this task's share of every pass; whoever finds the last pass complete writes the report.

    Raises:
        ConfigError: the recipe or the share cannot work, or OUT belongs to another job.
        DataError: input is missing or unreadable.
    """
    log.setup()
    recipe, source = _part(cfg, Recipe), _part(cfg, InputConfig)
    plan_passes = passes(recipe)
    check_packages(recipe)
    units = find_units(source)
    plan = Plan(recipe, source, plan_passes, output=Path(cfg.output), num_units=len(units))
    open_job(plan.output, job_facts(recipe, source, units))
    report = plan.output / REPORT
    try:
        if not report.exists():
            tally = run_passes(plan, units, cfg, wait_s=cfg.wait_s)
            write(plan.output, tally, recipe.steps, scratch=plan.work)
        close_job(plan.output)
    except FileNotFoundError:
        # Another task was faster with the last pass, and has removed the work folder.
        if not report.exists():
            raise
        close_job(plan.output)
    print(table(read_own(report, SHAPE)))
    print(
        f"{plan.output / 'documents'}: the documents that stayed; {plan.output / 'dropped'}: the "
        "others, with reasons."
    )


def _part(cfg: Any, kind: type[T]) -> T:
    """The settings of one of a config's base classes."""
    return kind(**{field.name: getattr(cfg, field.name) for field in fields(kind)})  # type: ignore[arg-type]


if __name__ == "__main__":
    cli.run(main, CleanConfig, config="clean", positional=["input", "output"])
