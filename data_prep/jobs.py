"""Work that may be killed at any moment and started again: units and completion markers.

    OUT/job.json              what the job is; another job is refused a folder that has one
    OUT/.work/<stage>/00000012.json    marker of unit 12: its result; written when everything it
                                       made is in place

    open_job -> run_units (this task's share, in processes) -> all markers there?
    -> under `locked`: finish, close_job

A unit is a pure function of the inputs: done twice, by whoever, it makes the same files. Files get
their final name when they are whole (`pipeline.files`), so what can be seen is good.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from tqdm import tqdm

from data_prep.forking import end_with_parent, workers_context
from pipeline.errors import ConfigError, DataError, MachineError
from pipeline.files import create_durably, parse_json, read_file, write_durably
from pipeline.log import logger
from pipeline.redaction import redact
from pipeline.shapes import misfits

JOB_FILE = "job.json"
WORK_FOLDER = ".work"
MOST_BYTES, MOST_MARKER_BYTES = 1 << 26, 1 << 28
"""Of job.json and report.json, which have kilobytes; and of what is in the work folder.

A marker has up to 300 bytes for each block of 2^20 tokens, and names every copy of one document.
2^28 bytes are 900,000 blocks of a unit, or a million copies with ids of 256 bytes.
"""
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class JobConfig:
    """Where the result goes and who does which part; nothing here changes a byte of the result."""

    output: str = MISSING
    """Folder of the result, local or on a shared file system."""
    workers: int = 0
    """Processes; 0: one for each core this task may use."""
    task: int | None = None
    """Number of this task, from 0; null: SLURM_ARRAY_TASK_ID, else 0."""
    num_tasks: int | None = None
    """Tasks that share the work; null: SLURM_ARRAY_TASK_COUNT, else 1."""


def open_job(output: Path, facts: dict[str, Any]) -> None:
    """Claim the folder for the job that `facts` describe, or join the same job.

    Args:
        output: the result's folder; made here.
        facts: everything that the bytes of the result follow from; JSON-able.

    Raises:
        ConfigError: the folder holds another job; the message names what differs.
        MachineError: the folder cannot be written.
    """
    # Two jobs whose addresses differ in their signature only are one; the secrets of the
    # environment play no part, for tasks may differ in them. A template is data, word for word:
    # "basic questions" in it looks like a key.
    whole = {key: value for key, value in facts.items() if key == "chat_template"}
    facts = redact(facts, {}) | whole
    with disk_errors(output):
        (output / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
        content = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
        # The first task wins; what a kill leaves goes with the work folder. A late one needs none:
        # whoever ends the job may be removing it.
        if not (output / JOB_FILE).exists():
            data = content.encode("utf-8", "backslashreplace")
            create_durably(output / JOB_FILE, data, scratch=output / WORK_FOLDER)
    found = read_own(output / JOB_FILE, dict)
    wanted = json.loads(json.dumps(facts))
    differ = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    if differ:
        changes = "; ".join(
            f"{key} was {_short(found.get(key))}, is {_short(wanted.get(key))}"
            for key in differ[:4]
        )
        raise ConfigError(
            f"{output} holds the result, whole or in part, of another job: {changes}. Mixing them "
            f"is refused: give another output=..., or remove {output}."
        )


def read_own(path: Path, shape: Any, *, most: int = MOST_BYTES) -> Any:
    """What a job wrote into its folder as JSON.

    Args:
        path: of the file; it has no link in its place.
        shape: see pipeline.shapes.
        most: bytes that it may have.

    Raises:
        FileNotFoundError: it is gone: another task has finished the job.
        DataError: it is not as a job writes it.
    """
    try:
        content = parse_json(read_file(path, most=most, inside=path.parent))
        problem = next(misfits(content, shape), "")
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            raise
        problem = str(error)
    if problem:
        raise DataError(
            f"{path} is not what a job wrote there: {problem}. Was the folder changed? Remove it, "
            "and prepare the data again."
        )
    return content


def close_job(output: Path) -> None:
    """Remove what was only needed while the job ran."""
    shutil.rmtree(output / WORK_FOLDER, ignore_errors=True)


def run_units(
    work: Path,
    units: Sequence[Any],
    run: Callable[[Any], dict[str, Any]],
    *,
    job: JobConfig,
    label: str,
    weight: Callable[[Any], int] = lambda _: 1,
    unit_name: str = "unit",
    on_done: Callable[[dict[str, Any]], None] = lambda _: None,
) -> bool:
    """Do this task's units without marker; True once all units of all tasks have one.

    Args:
        work: folder of the markers, one stage of the job.
        units: all units of the job, the same list in every task; unit i is done by task i mod
            num_tasks.
        run: makes the unit's files and returns what its marker shall hold; pickled by name, so a
            module's function or a partial of one.
        job: processes and tasks.
        label: in front of the progress bar.
        weight: size of a unit, for the bar.
        unit_name: what weights count; "B" is shown as bytes.
        on_done: gets each new result in this process, in any order; an error it raises ends the
            stage.

    Raises:
        PipelineError: a unit failed; finished units keep their markers.
    """
    task, num_tasks = task_of(job)
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    done = marked(work)
    mine = [i for i in range(len(units)) if i % num_tasks == task]
    todo = [i for i in mine if i not in done]
    if len(todo) < len(mine):
        logger.info(f"{label}: {len(mine) - len(todo)} of {len(mine)} units are done already")
    total = sum(weight(units[i]) for i in mine)
    first = total - sum(weight(units[i]) for i in todo)
    # One process draws. tqdm's own lock is shared with whatever this process forks: a fork that is
    # killed while it draws would keep it for ever.
    tqdm.set_lock(threading.RLock())
    with contextlib.ExitStack() as stack:
        size = {"total": total, "initial": first, "unit": unit_name, "unit_scale": True}
        bar = stack.enter_context(tqdm(desc=label, disable=None, smoothing=0.1, **size))
        workers = min(num_workers(job), len(todo))
        done_now = _results(work, units, todo, run, workers=workers)
        results = stack.enter_context(contextlib.closing(done_now))
        for i, result in results:
            bar.update(weight(units[i]))
            on_done(result)
    return len(marked(work)) == len(units)


def _results(
    work: Path,
    units: Sequence[Any],
    todo: list[int],
    run: Callable[[Any], dict[str, Any]],
    *,
    workers: int,
) -> Generator[tuple[int, dict[str, Any]]]:
    """(unit, result) as they are done, in this process or in several, which end with it."""
    if workers <= 1:
        for i in todo:
            yield i, _do(work, i, units[i], run)
        return
    context = workers_context(getattr(run, "func", run).__module__)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
    waiting = list(reversed(todo))
    running: dict[Future[dict[str, Any]], int] = {}
    try:
        while True:
            while waiting and len(running) < workers + 1:
                i = waiting.pop()
                running[pool.submit(_do, work, i, units[i], run)] = i
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise MachineError(
            "a worker process was killed from outside, mostly because memory ran out (see `dmesg` "
            "or the job's log). Run the same command again to go on; a lower workers=... or "
            "max_document_mb=... needs less memory."
        ) from error
    finally:
        for process in (
            list((pool._processes or {}).values()) if sys.exc_info()[0] or running else []
        ):
            process.terminate()  # the units it was at are done again by the next run
        pool.shutdown(wait=True, cancel_futures=True)


def _do(work: Path, number: int, unit: Any, run: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    with disk_errors(work):
        result = run(unit)
        # Names on disk may be no UTF-8: half of a surrogate pair, which JSON can escape.
        content = json.dumps(result, ensure_ascii=False).encode("utf-8", "backslashreplace")
        write_durably(marker_path(work, number), content)
    return result


def marker_path(work: Path, number: int) -> Path:
    """Completion marker of a unit."""
    return work / f"{number:08d}.json"


def marked(work: Path) -> set[int]:
    """Numbers of the units that are complete."""
    return {int(p.stem) for p in work.glob("*.json") if p.stem.isdecimal()}


def read_markers(work: Path, count: int, shape: Any = dict) -> list[dict[str, Any]]:
    """Results of all units, in order; see read_own."""
    paths = (marker_path(work, i) for i in range(count))
    return [read_own(path, shape, most=MOST_MARKER_BYTES) for path in paths]


def task_of(job: JobConfig) -> tuple[int, int]:
    """(task, num_tasks), from the settings or from a Slurm array.

    Raises:
        ConfigError: only one of the two is set, or task is not below num_tasks.
    """
    task, num_tasks = job.task, job.num_tasks
    if task is None and num_tasks is None and "SLURM_ARRAY_TASK_COUNT" in os.environ:
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", 0))
        task = int(os.environ["SLURM_ARRAY_TASK_ID"]) - first
        num_tasks = int(os.environ["SLURM_ARRAY_TASK_COUNT"])
    if (task is None) != (num_tasks is None):
        raise ConfigError(
            f"task ({task}) and num_tasks ({num_tasks}) belong together; set both, task from 0."
        )
    task, num_tasks = task or 0, 1 if num_tasks is None else num_tasks
    if not 0 <= task < num_tasks:
        raise ConfigError(
            f"task ({task}) must be at least 0 and below num_tasks ({num_tasks}). Slurm arrays "
            "count by ones: --array=0-63."
        )
    return task, num_tasks


def num_workers(job: JobConfig) -> int:
    """Processes of this task.

    Raises:
        ConfigError: workers is negative.
    """
    if job.workers < 0:
        raise ConfigError(f"workers ({job.workers}) must be 0 (one for each core) or more.")
    return job.workers or len(os.sched_getaffinity(0))


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Only one process at a time is in here, as far as the file system keeps locks."""
    (output / WORK_FOLDER).mkdir(exist_ok=True)
    with open(output / WORK_FOLDER / "lock", "wb") as file:
        with contextlib.suppress(
            OSError
        ):  # some network file systems have no locks; what is inside bears repetition
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Failures to write become one clear message."""
    try:
        yield
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise MachineError(
            f"{error.filename or place} cannot be written: {error.strerror}."
        ) from error
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise MachineError(
            f"no space is left to write below {place.parent} ({error.strerror}). Nothing "
            "half-written keeps a final name; free some space and run the same command again: "
            "finished units are kept."
        ) from error


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
