"""Console messages: one logger for both packages; rank 0 speaks, other ranks only warn.

    logger.info(...)    a message with time and rank, in lines of 78 columns
    say(...)            a line as it is

Both redact secrets, and neither raises: standard error may be closed, a full disk, or a terminal
that is gone, and what speaks there has more to do than that.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import textwrap
import traceback
import warnings
from types import TracebackType
from typing import Any, TextIO, cast

from pipeline.errors import visible
from pipeline.redaction import redact

logger = logging.getLogger("pretrain")
TERMINAL = 78
"""Columns of a line: a terminal of 80 does not break it."""
COLUMNS = TERMINAL - len("23:59:59 I ")
"""Of them, those of a message: the time stands before it."""


def setup(*, global_rank: int = 0) -> None:
    """Send messages to standard error; of ranks above 0 only warnings, marked with the rank."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(f"[rank {global_rank}] " if global_rank else ""))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if global_rank == 0 else logging.WARNING)
    logger.propagate = False
    # Advice to developers, repeated by every rank.
    for library in ("torch", "deepspeed", "megatron", "hydra"):
        warnings.filterwarnings("ignore", module=rf"{library}\.")


def broken(text: str, columns: int) -> list[str]:
    """Lines of at most so many columns, broken between words: a path stays whole, to be copied."""
    lines: list[str] = []
    for line in text.split("\n"):
        words = textwrap.wrap(
            line, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        lines += words if len(line) > columns else [line]
    return lines


class _Lines(logging.Formatter):
    """Messages without secrets, in lines that fit a terminal and do not command it.

    Each line begins with the time, the rank's mark and the level's letter.
    """

    def __init__(self, mark: str) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._mark = mark

    def format(self, record: logging.LogRecord) -> str:
        time = self.formatTime(record, self.datefmt)
        head = f"{time} {self._mark}{record.levelname[0]} "
        text = visible(redact(super().format(record)))
        return "\n".join(head + line for line in broken(text, COLUMNS - len(self._mark)))


def say(text: str) -> None:
    """Print to standard error, without secrets; whatever is wrong there, this returns."""
    with contextlib.suppress(OSError, ValueError):
        print(redact(text), file=sys.stderr, flush=True)


def open_standard_streams() -> None:
    """Call first: /dev/null stands in where standard input, output or error is closed.

    What is printed from then on commands no terminal, and no encoding refuses it. A file or a pipe
    gets every character as it is, as far as its encoding has it.

    The next file that is opened would get the number otherwise, and a library's messages with it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # the lowest free number, which is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - for the process's life
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stdout, _Visible) and sys.stdout.isatty():
        sys.stdout = cast(TextIO, _Visible(sys.stdout))


def flush_output() -> None:
    """Write what standard output still holds.

    Raises:
        OSError: it is full, or nobody reads it. The rest goes nowhere: the interpreter would try
            once more at its end, and fail in its own words.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise


class _Visible:
    """A terminal that names and texts of files do not command.

    Our own two colours pass.
    """

    _COLOURS = re.compile("(\x1b\\[32m|\x1b\\[0m)")

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        parts = self._COLOURS.split(text)  # every second one is a colour
        parts[::2] = map(visible, parts[::2])
        self._stream.write("".join(parts))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say_traceback(
    kind: type[BaseException], error: BaseException, stack: TracebackType | None
) -> None:
    """What sys.excepthook prints, without secrets."""
    say("".join(traceback.format_exception(kind, error, stack)).rstrip())


def in_units(num_bytes: float) -> str:
    """Such as `41.2 GiB`, `17 MiB` or `0.3 MiB`: never a quantity that is there as 0.0."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:,.1f} GiB"
    mib = num_bytes / 2**20
    return f"{mib:.0f} MiB" if mib >= 10 or not mib else f"{max(mib, 0.1):.1f} MiB"
