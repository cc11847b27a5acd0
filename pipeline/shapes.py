"""Whether a JSON value is what its reader expects, said before it is used.

FILE --read_object--> an object as `shape` says, or one sentence on what is wrong

int, float, str, bool, dict, list    of that type; a whole number is a float too
range(0, 9)                          a whole number in it
(a, b, None)                         one of these
[a]                                  a list of these
{str: a}                             an object with any keys
{"x": a, "y?": b}                    an object with x, perhaps y, perhaps more
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.files import parse_json, read_file

COUNT = range(2**53)
"""What a counter may hold: beyond, JSON readers of other languages lose digits."""


def read_object(
    path: Path,
    shape: dict[Any, Any],
    *,
    error: type[PipelineError],
    misfit: str,
    advice: str = "",
    inside: Path | None = None,
) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: of the file.
        shape: as in the module's docstring; {}: any object.
        error: what is raised.
        misfit: what a file of another shape is: "is not what pipeline.evaluate writes".
        advice: a sentence on the way out of that.
        inside: folder that the file's links must not lead out of; None: any.

    Raises:
        error: the file cannot be read, is no JSON, or is not as `shape` says; with the reason.
    """
    try:
        raw = read_file(path, inside=inside)
    except (OSError, ValueError) as found:
        raise error(f"{path} cannot be read: {found}.") from None
    return parse_object(raw, shape, name=str(path), error=error, misfit=misfit, advice=advice)


def parse_object(
    raw: bytes,
    shape: dict[Any, Any],
    *,
    name: str,
    error: type[PipelineError],
    misfit: str,
    advice: str = "",
) -> dict[str, Any]:
    """As `read_object`, of the bytes of a file that messages call `name`."""
    try:
        content = parse_json(raw)
    except ValueError as found:
        raise error(f"{name} cannot be read: {found}.") from None
    if wrong := next(misfits(content, shape), None):
        raise error(" ".join([f"{name} {misfit}: {wrong}.", *([advice] if advice else [])]))
    assert isinstance(content, dict)
    return content


def misfits(value: Any, shape: Any, place: str = "") -> Iterator[str]:
    """What is not as `shape` says, a place each: `loader.step is -1`.

    Args:
        value: of parse_json.
        shape: as in the module's docstring.
        place: where the value stands, for the message.
    """
    if isinstance(shape, tuple):
        if all(next(misfits(value, one, place), None) for one in shape):
            yield _says(value, place)
    elif isinstance(shape, range):
        if type(value) is not int or value not in shape:
            yield _says(value, place)
    elif isinstance(shape, dict) and isinstance(value, dict):
        yield from _misfits_of_object(value, shape, place)
    elif isinstance(shape, list) and isinstance(value, list):
        for number, one in enumerate(value):
            yield from misfits(one, shape[0], f"{place}[{number}]")
    elif not _is_of(value, shape):
        yield _says(value, place)


def _misfits_of_object(value: dict[str, Any], shape: dict[Any, Any], place: str) -> Iterator[str]:
    """The same of an object's keys and values."""
    dot = "." if place else ""
    if str in shape:
        for key, one in value.items():
            yield from misfits(one, shape[str], f"{place}{dot}{key}")
        return
    for name, one in shape.items():
        key = name.rstrip("?")
        if key in value:
            yield from misfits(value[key], one, f"{place}{dot}{key}")
        elif key == name:
            yield f"{place or 'it'} has no {key}"


def _is_of(value: Any, shape: Any) -> bool:
    if shape is None:
        return value is None
    if shape is float:
        # An int beyond floats ends in an OverflowError wherever it is computed with.
        return type(value) is float or (type(value) is int and abs(value) < 2**1000)
    return type(value) is (shape if isinstance(shape, type) else type(shape))


def _says(value: Any, place: str) -> str:
    text = repr(value) if not isinstance(value, float) or math.isfinite(value) else str(value)
    return f"{place or 'it'} is {text[:60]}{'...' if text[60:] else ''}"
