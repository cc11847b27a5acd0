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

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from data_prep.cleaning.filters import check_packages
from data_prep.cleaning.one_pass import Tally
from data_prep.cleaning.recipes import Recipe, passes
from data_prep.cleaning.report import table, write
from data_prep.cleaning.stages import Plan, link_keys, link_units, name_repeats, run_pass
from data_prep.jobs import (
    JobConfig,
    close_job,
    marked,
    num_workers,
    open_job,
    read_markers,
    run_units,
    task_of,
)
from data_prep.sources.inputs import InputConfig, Unit, find_units
from pipeline import cli, log
from pipeline.files import sha256_of

POLL_S = 2.0
REPORT = "report.json"
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
    open_job(plan.output, _facts(recipe, source, units))
    report = plan.output / REPORT
    try:
        if not report.exists():
            tally = _run(plan, units, cfg)
            write(plan.output, tally, recipe.steps, scratch=plan.work)
        close_job(plan.output)
    except (
        FileNotFoundError
    ):  # another task was faster with the last pass, and has removed the work folder
        if not report.exists():
            raise
        close_job(plan.output)
    print(table(json.loads(report.read_bytes())))
    print(
        f"{plan.output / 'documents'}: the documents that stayed; {plan.output / 'dropped'}: the "
        "others, with reasons."
    )


def _run(plan: Plan, units: list[Unit], cfg: CleanConfig) -> Tally:
    """Every stage in order; gives the counts of all units."""
    total = Tally()
    for number, now in enumerate(plan.passes):
        name = f"pass {number}"
        results = _stage(plan, name, units, partial(run_pass, plan, number), cfg)
        for result in results:
            total.add(result)
        if now.dedups:
            pieces = link_units(plan, number, sum(result["survivors"] for result in results))
            _stage(plan, f"{name} links", pieces, partial(link_keys, plan, number), cfg)
            _stage(plan, f"{name} repeats", [pieces], partial(name_repeats, plan, number), cfg)
    return total


def _stage(
    plan: Plan,
    name: str,
    units: Sequence[Any],
    run: Callable[[Any], dict[str, Any]],
    cfg: CleanConfig,
) -> list[dict[str, Any]]:
    """The result of each unit, done by this task, by others, or in an earlier run.

    A unit that two tasks do is the same twice, so a task that waits in vain may do anything that is
    missing.
    """
    work = plan.work / name.replace(" ", "-")
    is_complete = run_units(work, units, run, job=cfg, label=name)
    until = time.monotonic() + cfg.wait_s
    while not is_complete and time.monotonic() < until and not (plan.output / REPORT).exists():
        time.sleep(POLL_S)
        is_complete = len(marked(work)) == len(units)
    draw = random.Random(
        task_of(cfg)[0]
    )  # tasks that wait at the same time begin at different places
    stride = max(1, len(units) // num_workers(cfg))
    while not is_complete and (missing := sorted(set(range(len(units))) - marked(work))):
        few = replace(cfg, task=draw.choice(missing) % stride, num_tasks=stride)
        is_complete = run_units(work, units, run, job=few, label=f"{name}, for other tasks")
    return read_markers(work, len(units))


def _facts(recipe: Recipe, source: InputConfig, units: list[Unit]) -> dict[str, Any]:
    """Everything that the result follows from, enums by name."""
    listing = json.dumps([asdict(unit) for unit in units])
    # on_error is not among them: a unit that passed with fail has nothing to quarantine.
    reading = ("input", "format", "text_field", "url_field", "max_document_mb")
    facts = {
        "job": "clean",
        **{key: getattr(source, key) for key in reading},
        "units": len(units),
        "units_sha256": sha256_of(listing.encode()),
        "recipe": asdict(recipe),
    }
    return json.loads(json.dumps(facts, default=lambda value: value.name))


def _part(cfg: Any, kind: type[T]) -> T:
    """The settings of one of a config's base classes."""
    return kind(**{field.name: getattr(cfg, field.name) for field in fields(kind)})  # type: ignore[arg-type]


if __name__ == "__main__":
    cli.run(main, CleanConfig, config="clean", positional=["input", "output"])
