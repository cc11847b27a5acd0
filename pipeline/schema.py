"""What the settings of a command say of themselves: keys, types, meanings.

dataclass --keys--> dotted keys, sections before their fields --documentation--> a line each
list[dataclass] --settings--> also the keys of its entries, `data.train[].path`
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import textwrap
import typing
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from pipeline.errors import ConfigError

PATHS = set(
    """banned_words base cache_dir checkpoint data dataset device domains fallback_dir file folder
    histogram image image_root init_adapter init_from init_tower input other output page path
    pictures places remove run runs_dir template tokenizer tower""".split()
)
"""Last names of the settings that are paths."""


@lru_cache
def type_hints(schema: type) -> Mapping[str, Any]:
    """Field to type, of a dataclass; typing would resolve them anew at every call."""
    return typing.get_type_hints(schema)


def keys(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, type]]:
    """(dotted key, field, its dataclass) for every setting, sections last, before their fields.

    Between them what a command alone is asked would be missed: it may inherit its sections, whose
    settings are forty lines of a page.
    """
    hints = type_hints(schema)
    for field in sorted(
        dataclasses.fields(schema), key=lambda field: dataclasses.is_dataclass(hints[field.name])
    ):
        yield prefix + field.name, field, schema
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], f"{prefix}{field.name}.")


def settings(schema: type) -> Iterator[tuple[str, dataclasses.Field, type]]:
    """As `keys`, without sections, and with what each entry of a list of dataclasses has."""
    for key, field, owner in keys(schema):
        hint = type_hints(owner)[field.name]
        if dataclasses.is_dataclass(hint):
            continue
        yield key, field, owner
        for kind in entries(hint):
            yield from ((f"{key}[].{name}", inner, own) for name, inner, own in settings(kind))


def entries(hint: Any) -> list[type]:
    """The dataclasses that a list, or an optional list, is made of."""
    found = [hint, *typing.get_args(hint)]
    inner = [arg for kind in found for arg in typing.get_args(kind)]
    return [kind for kind in dict.fromkeys(inner) if dataclasses.is_dataclass(kind)]  # type: ignore[misc]


def documentation(field: dataclasses.Field, owner: type) -> str:
    """The text under a field in the source of the dataclass that has it; empty: there is none."""
    for kind in owner.__mro__:
        if dataclasses.is_dataclass(kind) and (text := field_docs(kind).get(field.name)):
            return text
    return ""


@lru_cache
def field_docs(owner: type) -> dict[str, str]:
    """Field name to the string literal under it in the source of a dataclass; not the inherited."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    assert isinstance(tree.body[0], ast.ClassDef)
    docs, last = {}, ""
    for node in tree.body[0].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and last:
            docs[last] = " ".join(str(node.value.value).split())
    return docs


def check_path(key: str, value: str) -> None:
    """Refuse what a shell has left of a setting that is a path: nothing, or `~` as it was typed.

    Taken literally, an empty fallback is none, and `~/runs` a folder called ~ in the present one.
    """
    if key.rpartition(".")[2] not in PATHS:
        return
    if not value:
        raise ConfigError(
            f"{key} is empty. Is a variable of the shell not set? Leave the setting out, or give "
            f"{key}=PATH."
        )
    home = os.path.expanduser(value)
    if home != value and not os.path.exists(value.partition("/")[0]):
        raise ConfigError(
            f"{key}={value}: shells expand `~` only where it begins a word. Write {key}={home}"
        )
