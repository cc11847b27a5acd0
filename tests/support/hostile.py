"""Damage of every kind to one file of a folder, and to every field of a JSON file; and what must hold afterwards."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import pickle
import random
import shutil
import signal
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

Damage = Callable[[Path], None]
TIME_LIMIT_S = 60
"""For one case, on a machine that does much besides; the slowest takes a second alone."""


class Hang(BaseException):
    """No `except Exception` takes it for damage."""


class _Code:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def pickle_of(canary: Path) -> bytes:
    """Makes the folder `canary` when it is loaded."""
    return pickle.dumps(_Code(canary), protocol=2)


def _socket(path: Path) -> None:
    folder, here = os.open(path.parent, os.O_RDONLY), os.getcwd()
    try:  # a socket's path has at most 108 bytes
        os.fchdir(folder)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)
        os.close(folder)


def of_file(outside: Path) -> dict[str, Damage]:
    """Damage to a file, whatever it holds; `outside`: a file that links may lead to."""

    def bytes_of(change: Callable[[bytes], bytes]) -> Damage:
        return lambda path: void(path.write_bytes(change(path.read_bytes())))

    def instead(make: Callable[[Path], Any]) -> Damage:
        return lambda path: (path.unlink(), void(make(path)))[1]

    def flipped(seed: int) -> Callable[[bytes], bytes]:
        def flip(content: bytes) -> bytes:
            changed = bytearray(content)
            place = random.Random(seed).randrange(len(changed))
            changed[place] ^= 1 << (seed % 8)
            return bytes(changed)

        return flip

    return {
        "missing": instead(lambda path: None),
        "empty": bytes_of(lambda content: b""),
        "half": bytes_of(lambda content: content[: len(content) // 2]),
        "cut": bytes_of(lambda content: content[:-1]),
        "longer": bytes_of(lambda content: content + b"\0"),
        "zeros": bytes_of(lambda content: bytes(4096)),
        "ones": bytes_of(lambda content: b"\xff" * 4096),
        "numbers": bytes_of(lambda content: b"9" * 6000),
        "deep": bytes_of(lambda content: b"[" * 100_000),
        "pickle": bytes_of(lambda content: pickle_of(outside.with_name("code-was-run"))),
        **{f"bit {seed}": bytes_of(flipped(seed)) for seed in range(4)},
        "pipe": instead(os.mkfifo),
        "socket": instead(_socket),
        "folder": instead(Path.mkdir),
        "device": instead(lambda path: path.symlink_to("/dev/zero")),
        "terminal": instead(lambda path: path.symlink_to("/dev/tty")),
        "link nowhere": instead(lambda path: path.symlink_to("nowhere")),
        "link to itself": instead(lambda path: path.symlink_to(path.name)),
        "link out": instead(lambda path: path.symlink_to(outside)),
    }


def void(_: Any) -> None:
    """Nothing, of whatever."""


def with_content(content: bytes) -> Damage:
    """These bytes, and no others."""
    return lambda path: void(path.write_bytes(content))


WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "negative": -1,
    "zero": 0,
    "half": 0.5,
    "nan": math.nan,
    "inf": math.inf,
    "huge": 10**30,
    "text": "../../../etc/passwd",
    "control": "a\x1b[2J\0\udcff",
    "list": [],
    "rows": [[1], "x", None],
    "object": {},
    "objects": {"x": {"x": []}, "": None},
}


def of_json(
    content: Any, *, depth: int = 4, write: Callable[[Path, Any], None] | None = None
) -> Iterator[tuple[str, Damage]]:
    """(name, damage) for every field of `content` taken away and replaced by each of WRONG."""
    write = write or (lambda path, changed: void(path.write_text(json.dumps(changed))))
    for place in _places(content, depth):
        name = ".".join(map(str, place))
        yield f"without {name}", _writes(write, _changed(content, place, ...))
        for kind, value in WRONG.items():
            yield f"{name} is {kind}", _writes(write, _changed(content, place, value))


def _writes(write: Callable[[Path, Any], None], changed: Any) -> Damage:
    return lambda path: write(path, changed)


def _places(content: Any, depth: int) -> Iterator[list[Any]]:
    """Paths to every value; of a list to the first."""
    if not depth or not isinstance(content, dict | list):
        return
    for key in content if isinstance(content, dict) else range(min(len(content), 1)):
        yield [key]
        yield from ([key, *rest] for rest in _places(content[key], depth - 1))


def _changed(content: Any, place: list[Any], value: Any) -> Any:
    changed = copy.deepcopy(content)
    owner = changed
    for key in place[:-1]:
        owner = owner[key]
    if value is ...:
        del owner[place[-1]]
    else:
        owner[place[-1]] = value
    return changed


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Hang in this thread after so long."""

    def stop(*_: Any) -> None:
        raise Hang(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def all_of(*uses: Callable[[], Any]) -> None:
    """Each use in spite of the others; then the first PipelineError of them, if there was one."""
    problems = []
    for use in uses:
        try:
            use()
        except PipelineError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def try_all(
    valid: Path, use: Callable[[Path], Any], cases: Iterator[tuple[str, str, Damage]], *, least: int
) -> None:
    """Use a copy of the valid folder after each (file, name, damage); all that goes wrong is told.

    least: number of cases below which they would not be what they are thought to be.
    """
    parent = valid.parent / "tried"
    use(shutil.copytree(valid, parent / "valid"))
    shutil.rmtree(parent)
    faults, number = {}, 0
    for number, (file, name, damage) in enumerate(cases, 1):  # noqa: B007
        folder = shutil.copytree(valid, parent / "copy")
        damage(folder / file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if fault := fault_of(use, folder):
                faults[f"{file}: {name}"] = fault
        written = {path.name for path in parent.iterdir()} - {"copy"}
        assert not written, f"{file}: {name}: written beside the folder: {written}"
        shutil.rmtree(parent)
    told = "\n".join(f"{case}: {fault}" for case, fault in faults.items())
    assert not faults, f"{len(faults)} of {number} cases:\n{told}"
    assert number >= least, number


def every(files: list[str], damages: dict[str, Damage]) -> Iterator[tuple[str, str, Damage]]:
    """(file, name, damage) of each file with each damage."""
    for file in files:
        for name, damage in damages.items():
            yield file, name, damage


def fault_of(use: Callable[[Path], Any], folder: Path) -> str | None:
    """What went wrong in a use of the folder, beside a PipelineError, which is right."""
    try:
        with time_limit(TIME_LIMIT_S):
            use(folder)
    except PipelineError as error:
        return None if str(error).strip() else "an error without a word"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust panic is no Exception
        trace, place = error.__traceback__, ""
        while trace is not None:
            place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
            trace = trace.tb_next
        return f"{type(error).__name__}: {str(error)[:200]} at {place}"
    return None


def snapshot(folder: Path) -> dict[str, str | bytes]:
    """All that lies in a folder, links as what they say."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    } | {str(path): "folder" for path in folder.rglob("*") if path.is_dir()}
