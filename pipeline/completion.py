"""What a shell offers behind `pretrain`: commands, settings, presets, values.

    eval "$(pretrain completion)"           in ~/.bashrc
    eval "$(pretrain completion zsh)"       in ~/.zshrc
    pretrain completion fish | source       in ~/.config/fish/config.fish

The shell asks the program (`pretrain --complete WORDS`): what is offered is what is there. Files it
offers itself, where the program offers nothing.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from pipeline import schema as schemas
from pipeline.errors import ConfigError

ASK = "--complete"
SCRIPTS = {
    "bash": """\
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
""",
    "zsh": """\
_pretrain() {
  local -a found
  found=("${(@f)$(command pretrain --complete "${(@Q)words[2,CURRENT-1]}" "$PREFIX" 2> /dev/null)}")
  found=(${found:#})
  if (( ! $#found )); then
    compset -P '*='  # of key=PATH the path
    _files
    return
  fi
  compadd -S '' -- ${(M)found:#*=}
  compadd -- ${found:#*=}
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _pretrain pretrain
""",
    "fish": """\
function __pretrain
    set -l before (commandline -opc)
    set -l word (commandline -ct)
    command pretrain --complete $before[2..-1] "$word" 2> /dev/null
end
complete -c pretrain -f -a '(__pretrain)'
complete -c pretrain -F -n 'test -z "$(__pretrain)"'
""",
}
"""By the shell that reads it; each asks `--complete` with the words behind `pretrain`, up to the
cursor."""


def script(shell: str) -> str:
    """What a shell reads when it starts.

    Raises:
        ConfigError: no such shell is known.
    """
    if shell not in SCRIPTS:
        raise ConfigError(f"{shell} cannot complete these commands; {', '.join(SCRIPTS)} can.")
    return SCRIPTS[shell]


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
            values += _values(schemas.type_hints(owner)[field.name])
    yield from (f"{key}={one}" for one in values if one.startswith(value))


def _values(hint: Any) -> list[str]:
    """Of an enum or a bool, also of an optional one; of anything else none."""
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if inspect.isclass(kind)]
    found = [member.name for kind in kinds if issubclass(kind, Enum) for member in kind]
    return found + ["true", "false"] * (bool in kinds)
