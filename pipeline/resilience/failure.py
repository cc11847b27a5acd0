"""The end of a failed job, in ten lines: the first rank that fails speaks for all.

    exception on a rank --claim a file--> first: message, our last frames, on standard error
                                          others: logs/failures/<launch>/00012.txt only

A crash on one rank makes every other rank fail in a collective; without the claim a job log ends in
as many interleaved tracebacks as there are ranks.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path

from pipeline.distributed.ranks import Ranks
from pipeline.errors import EXIT_BUG, DataError, PipelineError, printed
from pipeline.files import make_own, temporary_folder
from pipeline.log import say
from pipeline.redaction import redact

PACKAGE = Path(__file__).resolve().parents[1]
MAX_FRAMES = 4


def report(
    error: BaseException, *, ranks: Ranks, run_dir: Path | None, step: int | None, advice: str = ""
) -> int:
    """Exit code of the process; the report is on disk, the first rank's on standard error.

    Args:
        error: what ended the training.
        ranks: this rank.
        run_dir: the whole traceback goes to its logs/failures/. None: the start was refused, which
            leaves no trace in the run's folder; the ranks of a node then agree in /tmp who speaks.
        step: optimizer steps done, None before the first.
        advice: lines that are added to the short report, such as a memory breakdown.
    """
    code = error.exit_code if isinstance(error, PipelineError) else EXIT_BUG
    whole = redact("".join(traceback.format_exception(error)))
    failures = run_dir / "logs" / "failures" if run_dir else temporary_folder()
    folder = failures / launch_name()
    path = folder / f"{ranks.global_rank:05d}.txt"
    try:
        if not run_dir:
            make_own(failures)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(whole)
        try:
            with (folder / "first").open("x") as file:  # the claim: only one rank can create it
                file.write(f"{ranks.global_rank}\n")
        except FileExistsError:
            return code
    except OSError as problem:  # a full or read-only disk must not hide the failure
        # Nobody could claim to be the first. The main rank speaks, and a rank that alone knows what
        # is wrong: with its data; not a thousand ranks that know the same.
        if not ranks.is_main and not isinstance(error, DataError):
            return code
        say(f"(no report in {folder}: {problem})")
    say(short_report(error, ranks=ranks, step=step, path=path, advice=advice))
    return code


def short_report(
    error: BaseException, *, ranks: Ranks, step: int | None, path: Path, advice: str
) -> str:
    """At most ten lines, and the advice: who, when, what, our last frames, where the rest is."""
    where = f"rank {ranks.global_rank} on {ranks.node}" + (
        "" if step is None else f" after step {step}"
    )
    if isinstance(error, PipelineError):
        return printed(error) + (f" ({where})" if ranks.world_size > 1 else "")
    stack = traceback.extract_tb(error.__traceback__)
    frames = [f for f in stack if Path(f.filename).is_relative_to(PACKAGE)][-MAX_FRAMES:]
    message = str(error).strip().splitlines() or [""]
    lines = [
        f"error: {where}: {type(error).__name__}: {message[0][:300]}",
        *(f"  {_place(f)}:{f.lineno} {f.name}: {f.line}" for f in frames),
        f"  whole traceback: {path}; the other ranks' beside it",
        *advice.splitlines(),
    ]
    return "\n".join(lines)


def _place(frame: traceback.FrameSummary) -> str:
    """A file of this package as a person names it, e.g. pipeline/train.py."""
    return f"{PACKAGE.name}/{Path(frame.filename).relative_to(PACKAGE)}"


def launch_name(environment: os._Environ[str] | dict[str, str] = os.environ) -> str:
    """A name all ranks of one start of the job share, and no other start has."""
    if "SLURM_JOB_ID" in environment:
        return f"{environment['SLURM_JOB_ID']}-{environment.get('SLURM_RESTART_COUNT', '0')}"
    name = environment.get("TORCHELASTIC_RUN_ID", "local")
    return f"{name}-{os.getppid()}-{environment.get('MASTER_PORT', '0')}"
