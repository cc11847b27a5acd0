"""The project in Python, for notebooks: compose, train, load, generate, history.

    from pipeline import api

    api.command("tokenize text.txt my/tokens tokenizer=my/tokenizer.json")
    cfg = api.compose("experiment=your-text", "data.path=my/tokens")
    cfg.training.total_steps = 300
    run = api.train(cfg)
    run.history()                              # a table; pandas.DataFrame(run.history()) takes it
    model = api.load(run)
    print(model.generate("Once upon a time", temperature=0.7))

Training and commands run in processes of their own, as they do on the command line: a run that
fails leaves the notebook as it is, and its memory is given back. What is wrong raises a
PipelineError (pipeline/errors.py). Interrupting the cell is Ctrl-C: the run saves and ends, and the
same call goes on.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import Enum
from html import escape
from pathlib import Path
from typing import Any, TypeVar, cast

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.data.chat import Messages
from pipeline.errors import ConfigError, DivergedError, MachineError, PipelineError
from pipeline.inference.front import ended_with_this_process
from pipeline.inference.generation import GenerateConfig, check_drawing
from pipeline.inference.samplers import open_sampler
from pipeline.tracking.history import History
from pipeline.training import startup

T = TypeVar("T")
DRAWN = ("max_new_tokens", "temperature", "top_k", "top_p", "stop", "seed")
"""Settings of `pretrain generate` that a call of a loaded model takes."""
SHOWN = ("step", "tokens", "train/loss", "train/lr", "train/grad_norm", "throughput/tokens_per_sec")
"""Columns of a history that names none; held-out losses and bits per byte stand behind them."""


def compose(*words: str) -> PretrainConfig:
    """All settings of a run, as `pretrain train` composes them of these words.

    Fields can be changed afterwards; `train` checks types and rules again.

    Raises:
        ConfigError: a word is not understood.
    """
    return cli.compose(PretrainConfig, words, config="pretrain")


def train(cfg: PretrainConfig, *, show: bool = True) -> Run:
    """Train in a process of its own, or go on at the newest checkpoint; the run.

    Several processes: launch/local.sh, with the same settings.

    Args:
        cfg: from `compose`.
        show: print the log as it comes.

    Raises:
        PipelineError: settings, data, folder or machine do not fit; all that is found before the
            process starts is raised as on the command line.
        DivergedError: the loss was not finite, or jumped, for too long.
    """
    values = json.loads(json.dumps(asdict(cfg), default=_by_name))
    checked = _typed(PretrainConfig, values)
    startup.check(checked, world_size=1)
    code = "from pipeline import api; api.train_from_standard_input()"
    _run([sys.executable, "-c", code], stdin=json.dumps(values), show=show)
    return Run(Path(cfg.runs_dir) / cfg.name)


def train_from_standard_input() -> None:
    """What the process of `train` does: settings come in as JSON; the command's exit code."""
    from pipeline import train as command

    cfg = _typed(PretrainConfig, json.load(sys.stdin))
    sys.argv[1:] = []
    cli.run(lambda _: command.main(cfg), PretrainConfig, config="pretrain")


def command(words: str | Sequence[str], *, show: bool = True) -> str:
    """Any command, `pretrain WORDS`, in a process of its own; what it printed.

    Args:
        words: as in a shell, or one by one.
        show: print it as it comes.

    Raises:
        PipelineError: the command refuses, with its message.
    """
    words = shlex.split(words) if isinstance(words, str) else list(words)
    return _run([sys.executable, "-m", "pipeline.pretrain", *words], stdin="", show=show)


def load(source: Run | str | Path) -> Model:
    """The model of a run (its newest checkpoint), a checkpoint, or a Hugging Face folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return Model(source.folder if isinstance(source, Run) else Path(source))


class Table(list[dict[str, Any]]):
    """Rows; shown as a table in a notebook."""

    @property
    def columns(self) -> list[str]:
        """Names, in the order in which they come."""
        return list(dict.fromkeys(name for row in self for name in row))

    def column(self, name: str) -> list[Any]:
        """One value of each row that has it."""
        return [row[name] for row in self if name in row]

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        rows = (
            "".join(f"<td>{escape(_shown(row.get(name)))}</td>" for name in self.columns)
            for row in self
        )
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


@dataclass(frozen=True)
class Run:
    """A run's folder, runs/NAME."""

    folder: Path

    def history(self, *columns: str) -> Table:
        """What was logged, a row a step, by the names of metrics.jsonl.

        Args:
            columns: these only; none: SHOWN, and held-out losses.

        Raises:
            DataError: nothing is logged yet, or the file is of something else.
        """
        history = History.load(self.folder)
        rows: dict[int, dict[str, Any]] = {row["step"]: dict(row) for row in history.steps}
        for name, found in history.evaluations.items():
            for row in found:
                scores = {f"val/{name}/{key}": row[key] for key in ("loss", "bits_per_byte")}
                rows.setdefault(row["step"], {"step": row["step"], "tokens": row["tokens"]})
                rows[row["step"]] |= scores
        wanted = columns or (
            *SHOWN,
            *(f"val/{n}/{key}" for n in history.evaluations for key in ("loss", "bits_per_byte")),
        )
        picked = (
            {key: row[key] for key in wanted if key in row} for _, row in sorted(rows.items())
        )
        return Table(row for row in picked if row)


class Model:
    """A model that continues texts, and answers if it was trained on dialogues."""

    def __init__(self, checkpoint: Path) -> None:
        """Load it; nothing is written."""
        self._stack = ExitStack()
        self._cfg = GenerateConfig(checkpoint=str(checkpoint))
        self._sampler = self._stack.enter_context(open_sampler(self._cfg))

    def generate(
        self, prompt: str = "", *, on_text: Callable[[str], None] | None = None, **settings: Any
    ) -> str:
        """What follows `prompt`; an empty one begins a document.

        Args:
            prompt: text.
            on_text: gets the text piece by piece as it is drawn.
            settings: max_new_tokens, temperature, top_k, top_p, stop, seed of `pretrain generate`.

        Raises:
            ConfigError: a setting is unknown or impossible.
        """
        return self._drawing(settings).sample([prompt], on_text=on_text)[0]

    def answer(
        self, messages: Messages, *, on_text: Callable[[str], None] | None = None, **settings: Any
    ) -> str:
        """What the assistant says next to [{"role": "user", "content": ...}, ...].

        Raises:
            ConfigError: the model was not trained on dialogues, or as `generate`.
        """
        return self._drawing(settings).answer([messages], on_text=on_text)[0]

    def close(self) -> None:
        """Give back what loading took on the disk; the end of Python does, too."""
        self._stack.close()

    def _drawing(self, settings: Mapping[str, Any]) -> Any:
        """The sampler with these settings, its random numbers at the seed's beginning."""
        import torch

        if others := [name for name in settings if name not in DRAWN]:
            raise ConfigError(f"{', '.join(others)}: a call takes {', '.join(DRAWN)}.")
        values = asdict(self._cfg) | dict(settings)
        cfg = _typed(GenerateConfig, values)
        check_drawing(cfg)
        torch.manual_seed(cfg.seed)
        return self._sampler.drawing(cfg)


def _typed(schema: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass of nested values, enums by name; ConfigError where one has not its type."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        node = OmegaConf.merge(OmegaConf.structured(schema), cli.literal(dict(values)))
        return cast(T, OmegaConf.to_object(node))
    except OmegaConfBaseException as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{error.full_key or 'a setting'}: {reason}") from error


def _by_name(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    raise TypeError(f"{type(value).__name__} is no setting")


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if type(value) is int
        else str(value)
    )


def _run(words: Sequence[str], *, stdin: str, show: bool) -> str:
    """Run a program of ours, show what it says, and raise what it refuses."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    said: list[str] = []
    with subprocess.Popen(
        [*ended_with_this_process("TERM"), *words],  # of a kernel that is restarted: save and end
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
        start_new_session=True,  # it is told of an interrupt once, by us
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            with process.stdin as inbox:
                inbox.write(stdin)
        except BrokenPipeError:  # it ended before it read: its exit code says why
            pass
        _listen(process.stdout, process, said, show=show)
        code = process.wait()
    if code:
        _raise(code, said)
    return "".join(said)


def _listen(
    lines: Iterable[str], process: subprocess.Popen[str], said: list[str], *, show: bool
) -> None:
    """Keep each line until the last one; an interrupt is handed on, and what it says is heard."""
    while True:
        try:
            for line in lines:
                said.append(line)
                if show:
                    print(line, end="", flush=True)
            return
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)


def _raise(code: int, said: Sequence[str]) -> None:
    """The error that an exit code stands for, with the message that the process printed."""
    if code in (128 + signal.SIGINT, -signal.SIGINT):
        raise KeyboardInterrupt
    starts = [number for number, line in enumerate(said) if line.startswith("error: ")]
    message = "".join(said[starts[-1] :] if starts else said[-20:]).removeprefix("error: ").strip()
    known = {PipelineError.exit_code: PipelineError, DivergedError.exit_code: DivergedError}
    raise known.get(code, MachineError)(message or f"the process ended with exit code {code}.")
