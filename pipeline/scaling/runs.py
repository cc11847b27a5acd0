"""The runs of a ladder: made on this machine, and read when they are done.

    Rung --make: launch/local.sh--> runs/LADDER/RUNG/ --read--> Run(N, D, loss, course)

A run that is done is not made again; one that was stopped goes on at its last checkpoint, as any
run of pipeline.train does.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.errors import ConfigError, DataError, MachineError
from pipeline.files import parse_yaml, read_file
from pipeline.scaling.ladder import Rung
from pipeline.tracking.history import History

LAUNCHER = Path(__file__).resolve().parents[2] / "launch" / "local.sh"
# Settings that change neither a weight nor the held-out loss; a run may have been made with others.
FREE = {
    "training": {"eval_every", "gc_every", "profile_steps", "micro_batch_size", "recompute"},
    "model": {"name", "compile"},
    # train and validation say what path stands for, and packed data decide of masks by themselves.
    "data": {"path", "mask_documents", "reset_positions", "prefetch_steps", "cache_dir",
             "cache_size_gib", "allow_dataset_change"},
}  # fmt: skip
COMPARED = ("seed", "model", "optimizer", "schedule", "training", "finetune")
COURSE = tuple(step / 20 for step in range(4, 21))
"""Parts of a run at which its training loss is looked at. Before, it warms up and falls so fast
that runs of different lengths do not compare."""
WINDOW = 1 / 20
"""Part of a run over which its training loss is averaged."""


@dataclass(frozen=True)
class Run:
    """What a finished run says of the law."""

    name: str
    size: str
    parameters: int
    """N."""
    tokens: int
    """D."""
    flops: float
    loss: float
    """Held out, after the last step, nats per token."""
    course: tuple[float, ...]
    """Training loss at the parts of COURSE, NaN where none was logged."""
    datasets: dict[str, Any]
    """Identities of the training data, as the run recorded them."""


def run_dir(rung: Rung) -> Path:
    """The run's folder."""
    return Path(rung.cfg.runs_dir) / rung.cfg.name


def is_done(rung: Rung) -> bool:
    """Whether the run has made its last step, with the settings that the ladder has now.

    Raises:
        ConfigError: it was made with others.
    """
    if not (run_dir(rung) / "DONE").exists():
        return False
    if others := [*changed(run_dir(rung), rung.cfg, COMPARED)]:
        raise ConfigError(
            f"{run_dir(rung)} was made with other settings than the ladder has now: "
            f"{'; '.join(others)}. Give the ladder another name=..., or delete that folder."
        )
    return True


def check_can_make(*, processes: int) -> None:
    """Raise ConfigError where only one process can be started: a wheel has no launcher."""
    if processes > 1 and not LAUNCHER.exists():
        raise ConfigError(
            f"processes={processes} needs launch/local.sh, which only the clone of this project "
            "has: run the command there, or set processes=1."
        )


def make(rung: Rung, *, processes: int) -> None:
    """Train the run here to its end.

    Raises:
        MachineError: it ended before its last step; what it said stands above.
    """
    code = launch(rung.words, processes=processes)
    if not (run_dir(rung) / "DONE").exists():
        raise MachineError(
            f"run {rung.name} ended before its last step, with exit code {code}. The same command "
            "goes on with it; runs that are done are not made again."
        )


def launch(words: Sequence[str], *, processes: int) -> int:
    """Train here with these settings of pipeline.train until that ends; its exit code.

    A notice that this process is given goes to the run, which saves and ends.
    """
    command = [sys.executable, "-m", "pipeline.train", *words]
    if LAUNCHER.exists():
        command = [str(LAUNCHER), str(processes), *words]
    # The launcher looks for an interpreter of its own; in a container there is none but this one.
    python = {} if " " in sys.executable else {"PYTHON": sys.executable}
    with _started(command, {**os.environ, **python}) as child:
        return child.wait()


def read(rung: Rung, *, held_out: str | None) -> Run:
    """What a finished run reached.

    Args:
        held_out: the dataset whose loss counts; None: the only one.

    Raises:
        DataError: the run has no held-out loss of its last step, or of several datasets.
    """
    folder = run_dir(rung)
    history = History.load(folder)
    names = [held_out] if held_out is not None else sorted(history.evaluations)
    if len(names) != 1:
        raise DataError(
            f"{folder} has held-out losses of {', '.join(names) or 'no dataset'}; one counts. "
            + ("Choose it with held_out=NAME." if names else "Set data.validation.")
        )
    rows = history.evaluations.get(names[0], [])
    if not rows or rows[-1]["step"] != rung.shape.total_steps or math.isnan(rows[-1]["loss"]):
        raise DataError(
            f"{folder}/metrics.jsonl has no loss on {names[0]} after the last step "
            f"({rung.shape.total_steps}). Delete the folder and start the same command again."
        )
    return Run(
        name=rung.name,
        size=rung.size,
        parameters=rung.parameters,
        tokens=rung.tokens,
        flops=rung.flops,
        loss=rows[-1]["loss"],
        course=course(history, total_tokens=rung.tokens),
        datasets=history.facts.get("datasets", {}),
    )


def check_same_data(runs: Sequence[Run]) -> None:
    """Raise DataError unless all runs read the same datasets, tokenizers included."""
    for run in runs:
        if set(run.datasets) != set(runs[0].datasets):
            raise DataError(
                f"runs {runs[0].name} and {run.name} read different data (identities "
                f"{_short(runs[0].datasets)} and {_short(run.datasets)}): their losses do not lie "
                "on one curve. Prepare nothing anew under a ladder; delete the older runs."
            )


def course(
    history: History, *, total_tokens: int, parts: Sequence[float] = COURSE
) -> tuple[float, ...]:
    """Mean training loss of the WINDOW before each part of a run; NaN: none was logged."""
    found = list(zip(history.column("tokens"), history.column("train/loss")))
    means = []
    for part in parts:
        begin, end = ((part - width) * total_tokens for width in (WINDOW, 0.0))
        losses = [loss for tokens, loss in found if begin < tokens <= end and loss == loss]
        means.append(sum(losses) / len(losses) if losses else math.nan)
    return tuple(means)


def _short(datasets: dict[str, Any]) -> str:
    return "+".join(sorted(identity[:12] for identity in datasets)) or "unknown"


def changed(folder: Path, cfg: PretrainConfig, sections: Sequence[str]) -> Iterator[str]:
    """`key: a value then, another one now` of settings of a run that count and differ.

    Args:
        folder: of the run, which is there.
        cfg: the settings now.
        sections: that are compared.

    Raises:
        DataError: the run does not say its settings.
    """
    path = folder / "config.yaml"
    try:
        made = parse_yaml(read_file(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    now = cli.to_dict(cfg)
    made = made if isinstance(made, dict) else {}
    for section in sections:
        one, other = made.get(section), now[section]
        if not isinstance(other, dict) or not isinstance(one, dict):
            one, other, prefix = {section: one}, {section: other}, ""
        else:
            prefix = f"{section}."
        for key in other:
            # A setting that is not in the run's file is younger than the run.
            if key in one and key not in FREE.get(section, ()) and one[key] != other[key]:
                yield f"{prefix}{key}: {one.get(key)} then, {other[key]} now"


@contextlib.contextmanager
def _started(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen]:
    """The run, which is handed the notices that this process gets, and saves and ends.

    Also one that comes while it starts: by default it would end this process, and leave the run
    alone. A Ctrl-C reaches the run by itself, as it belongs to the same terminal; a second one
    would end it at once.
    """
    child: subprocess.Popen | None = None
    early: list[int] = []

    def hand_on(number: int, _frame: Any) -> None:
        early.append(number) if child is None else child.send_signal(number)

    # A handler and not SIG_IGN, which the run would inherit.
    wanted: dict[int, Any] = {
        signal.SIGINT: lambda *_: None,
        signal.SIGTERM: hand_on,
        signal.SIGUSR2: hand_on,
    }
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        with subprocess.Popen(command, env=environment) as child:
            for number in early:
                child.send_signal(number)
            yield child
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
