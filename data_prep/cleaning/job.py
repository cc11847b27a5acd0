"""A cleaning job: the stages of every pass in order, shared by tasks that may die or never start.

    pass 0 -> links -> repeats -> pass 1 -> ...     each a stage of units with markers (jobs.py)

A unit that two tasks do is the same twice, so a task that waits in vain may do what is missing.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from data_prep.cleaning.one_pass import Tally
from data_prep.cleaning.recipes import Recipe
from data_prep.cleaning.stages import Plan, link_keys, link_units, name_repeats, run_pass
from data_prep.jobs import JobConfig, marked, num_workers, read_markers, run_units, task_of
from data_prep.sources.inputs import InputConfig, Unit
from pipeline.files import sha256_of
from pipeline.redaction import redact

POLL_S = 2.0
REPORT = "report.json"


def run_passes(plan: Plan, units: list[Unit], job: JobConfig, *, wait_s: float) -> Tally:
    """Every stage in order; gives the counts of all units.

    Args:
        plan: recipe, input and places.
        units: of the input.
        job: this task's share and processes.
        wait_s: how long to wait for other tasks before doing what they lack, seconds.
    """
    stage = partial(_stage, plan, job=job, wait_s=wait_s)
    total = Tally()
    for number, now in enumerate(plan.passes):
        name = f"pass {number}"
        results = stage(name, units, partial(run_pass, plan, number))
        for result in results:
            total.add(result)
        if now.dedups:
            pieces = link_units(plan, number, sum(result["survivors"] for result in results))
            stage(f"{name} links", pieces, partial(link_keys, plan, number))
            stage(f"{name} repeats", [pieces], partial(name_repeats, plan, number))
    return total


def _stage(
    plan: Plan,
    name: str,
    units: Sequence[Any],
    run: Callable[[Any], dict[str, Any]],
    *,
    job: JobConfig,
    wait_s: float,
) -> list[dict[str, Any]]:
    """The result of each unit, done by this task, by others, or in an earlier run.

    A unit that two tasks do is the same twice, so a task that waits in vain may do anything that is
    missing.
    """
    work = plan.work / name.replace(" ", "-")
    is_complete = run_units(work, units, run, job=job, label=name)
    until = time.monotonic() + wait_s
    while not is_complete and time.monotonic() < until and not (plan.output / REPORT).exists():
        time.sleep(POLL_S)
        is_complete = len(marked(work)) == len(units)
    # Tasks that wait at the same time begin at different places; a stride of units is shared by the
    # workers of one task.
    draw = random.Random(task_of(job)[0])
    stride = max(1, len(units) // num_workers(job))
    while not is_complete and (missing := sorted(set(range(len(units))) - marked(work))):
        few = replace(job, task=draw.choice(missing) % stride, num_tasks=stride)
        is_complete = run_units(work, units, run, job=few, label=f"{name}, for other tasks")
    return read_markers(work, len(units))


def job_facts(recipe: Recipe, source: InputConfig, units: list[Unit]) -> dict[str, Any]:
    """Everything that the result follows from, enums by name."""
    listing = json.dumps(redact([asdict(unit) for unit in units], {}))
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
