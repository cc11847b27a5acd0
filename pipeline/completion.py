"""What a shell offers behind `pretrain`: commands, settings, presets, values.

    eval "$(pretrain completion)"      in ~/.bashrc

The shell asks the program (`pretrain --complete WORDS`): what is offered is what is there. Files it
offers itself.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from pipeline import schema as schemas

ASK = "--complete"
SCRIPT = """\
_pretrain() {
  local line=${COMP_LINE:0:COMP_POINT} found
  local word=${line##* }
  local words=(${line#* })
  [[ -n $word ]] || words+=("")
  mapfile -t found < <(command pretrain --complete "${words[@]}" 2> /dev/null)
  # bash breaks words at `=`: what stands before it is typed already.
  [[ $word == *=* ]] && found=("${found[@]#*=}")
  COMPREPLY=("${found[@]}")
  [[ ${#found[@]} -gt 0 && ${found[0]} == *= ]] && compopt -o nospace
}
complete -o default -F _pretrain pretrain
"""


def answer(word: str, schema: type, groups: Mapping[str, Sequence[str]]) -> int:
    """Print what is offered, a line each; an exit code."""
    for found in offered(word, schema, groups):
        print(found)
    return 0


def offered(word: str, schema: type, groups: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Words that `word` can become: `key=`, `group=`, and behind the sign their values."""
    key, equals, value = word.partition("=")
    if not equals:
        names = [*groups, *(name for name, *_ in schemas.settings(schema) if "[]" not in name)]
        yield from (f"{name}=" for name in dict.fromkeys(names) if name.startswith(word))
        return
    values = [*groups.get(key, [])]
    for name, field, owner in schemas.settings(schema):
        if name == key:
            values += _values(typing.get_type_hints(owner)[field.name])
    yield from (f"{key}={one}" for one in values if one.startswith(value))


def _values(hint: Any) -> list[str]:
    """Of an enum or a bool, also of an optional one; of anything else none."""
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if inspect.isclass(kind)]
    found = [member.name for kind in kinds if issubclass(kind, Enum) for member in kind]
    return found + ["true", "false"] * (bool in kinds)
