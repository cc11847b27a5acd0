"""What `--help` prints: the module's docstring, the groups of presets, and every setting.

A setting has its value in the composed config, the choices of an enum, and its meaning.
"""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from pipeline import schema as schemas

MOST_COLUMNS = 100


def help_text(
    main: Callable,
    schema: type,
    *,
    groups: Mapping[str, Sequence[str]],
    values: Mapping[str, Any],
    positional: Sequence[str],
) -> str:
    """The page.

    Args:
        main: of the command; its module's docstring comes first.
        schema: dataclass of the command.
        groups: names of presets by group.
        values: composed settings, sections as mappings; `???`: has no default.
        positional: settings that may be given without their name.
    """
    lines = [*_prose(inspect.cleandoc(sys.modules[main.__module__].__doc__ or "")), ""]
    if groups:
        lines.append("Presets (group=name):")
        for group, options in groups.items():
            lines += _wrapped(f"{group}: {', '.join(options)}", "  ", "      ")
        lines.append("")
    lines += _wrapped(
        "Settings (key=value), with the values they have now: presets given beside --help count. "
        "--cfg prints the composed config instead of running.", "", "",
    )  # fmt: skip
    for key, field, owner in schemas.settings(schema):
        hint = schemas.type_hints(owner)[field.name]
        value = default_of(field) if "[]" in key else look_up(values, key)
        mark = " (may be given without its name)" if key in positional else ""
        lines += _wrapped(f"{key} = {shown(value)}{_choices(hint)}{mark}", "  ", "      ")
        lines += _wrapped(schemas.documentation(field, owner), "      ", "      ")
    return "\n".join(lines)


def default_of(field: dataclasses.Field) -> Any:
    """A field's own default; `???` where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "???" if field.default is dataclasses.MISSING else field.default


def shown(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, str) and value == "???":
        return "(required)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, Enum):
        return value.name
    return "null" if value is None else str(value)


def look_up(values: Any, key: str) -> Any:
    """The value of a dotted key in nested mappings."""
    for part in key.split("."):
        values = values[part] if isinstance(values, Mapping) else getattr(values, part)
    return values


def _choices(hint: Any) -> str:
    """The members of an enum, also of an optional one."""
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if inspect.isclass(kind)]
    names = [member.name for kind in kinds if issubclass(kind, Enum) for member in kind]
    return f"   ({' | '.join(names)})" if names else ""


def _prose(text: str) -> list[str]:
    """A docstring as wide as the terminal; its commands, which are indented, as they are."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        as_it_is = paragraph.split("\n")
        is_prose = not any(line.startswith(" ") for line in as_it_is)
        lines += [*(_wrapped(" ".join(as_it_is), "", "") if is_prose else as_it_is), ""]
    return lines[:-1]


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    columns = max(40, min(MOST_COLUMNS, shutil.get_terminal_size((MOST_COLUMNS, 24)).columns))
    return textwrap.wrap(
        text, columns, initial_indent=first, subsequent_indent=rest, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
