"""From the words on a command line to one typed config, or to one clear message.

    argv --split--> positional words, raw strings, hydra overrides
         --compose conf/ + schema--> dataclass --> main(cfg)

Every entry point of the project is `cli.run(main, Schema, config="name")`. `--help` prints the
module's docstring and each field with the line of documentation under it; it imports neither hydra
nor torch. Nothing else here imports hydra.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import os
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pipeline import log
from pipeline.errors import ConfigError, PipelineError, printed
from pipeline.files import own_compiled_code
from pipeline.redaction import redact

PATHS = set(
    """banned_words base cache_dir checkpoint data dataset device domains fallback_dir file folder
    histogram init_adapter init_from input other output page path run runs_dir template
    tokenizer""".split()
)
"""Last names of the settings that are paths."""
CONF_DIR = Path(__file__).resolve().parents[1] / "conf"
T = TypeVar("T")


def run(
    main: Callable[[T], int | None], schema: type[T], *, config: str, positional: Sequence[str] = ()
) -> NoReturn:
    """Exit with main's code, after composing `schema` from sys.argv.

    Args:
        main: gets the composed dataclass; returns an exit code, None is 0.
        schema: dataclass of the job; also the schema of conf/<config>.yaml when that file exists.
        config: name of the job and of its yaml file, if it has one.
        positional: fields that may be given without `key=`, in this order.
    A PipelineError ends in its message on standard error and its exit code, without a traceback.
    """
    log.open_standard_streams()
    sys.excepthook = log.say_traceback
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(help_text(main, schema, config=config, positional=positional))
        sys.exit(0)
    try:
        show_only = "--cfg" in arguments
        cfg = compose(
            schema, [a for a in arguments if a != "--cfg"], config=config, positional=positional
        )
        if show_only:
            print(to_yaml(cfg), end="")
            sys.exit(0)
        own_compiled_code()
        sys.exit(main(cfg) or 0)
    except PipelineError as error:
        log.say(printed(error))
        sys.exit(error.exit_code)


def compose(
    schema: type[T], arguments: Sequence[str], *, config: str, positional: Sequence[str] = ()
) -> T:
    """The dataclass that conf/<config>.yaml, its groups and the command-line words give.

    Raises:
        ConfigError: unknown key, wrong type, unknown option, or a required value that is not set.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    overrides, raw = _split(arguments, schema, positional)
    for path in CONF_DIR.rglob("*.yaml"):
        if not path.is_file():  # a pipe would be waited for, without end
            raise ConfigError(f"{path} is not an ordinary file; take it out of conf/.")
    has_yaml = (CONF_DIR / f"{config}.yaml").exists()
    # A yaml file names its schema first in `defaults`; a job without one is its schema.
    ConfigStore.instance().store(f"{config}_schema" if has_yaml else config, schema)
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            node = hydra_compose(config, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, schema)) from error
    except (YAMLError, OSError, ValueError, TypeError, RecursionError) as error:
        # Of a preset in conf/; yaml's own errors name the file and the line.
        raise ConfigError(f"a file of {CONF_DIR} cannot be read: {error}") from error
    try:
        for key, value in raw.items():
            OmegaConf.update(node, key, literal(value))
        return typing.cast(T, OmegaConf.to_object(node))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, schema)) from error


def literal(value: Any) -> Any:
    """A value, with nested ones, so that OmegaConf gives its texts back as they are.

    `${...}` is not looked up. Backslashes before `${` are OmegaConf's escapes, so those are
    doubled, and no others.
    """
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def to_yaml(cfg: Any) -> str:
    """The composed config as yaml, enums by name, without secrets: it is written and shown.

    As OmegaConf.to_yaml writes it, which would take a text with `${` apart.
    """
    import yaml
    from omegaconf._utils import get_omega_conf_dumper

    dumper = get_omega_conf_dumper()
    return yaml.dump(to_dict(cfg), Dumper=dumper, allow_unicode=True, sort_keys=False)


def to_dict(cfg: Any) -> dict[str, Any]:
    """The composed config as plain JSON-able values, enums by name, without secrets."""
    return redact(typing.cast("dict[str, Any]", _plain(dataclasses.asdict(cfg))))


def _plain(value: Any) -> Any:
    """Nested values, enums by name."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.name if isinstance(value, Enum) else value


def keys(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, type]]:
    """(dotted key, field, its dataclass) for every setting, sections before their fields."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield prefix + field.name, field, schema
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], f"{prefix}{field.name}.")


def _split(
    arguments: Sequence[str], schema: type, positional: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Hydra's overrides, and the values of `str` fields, at whatever depth.

    Those are taken as they are: Hydra's grammar would trip over their commas, quotes and braces.
    """
    hints = {key: typing.get_type_hints(owner)[field.name] for key, field, owner in keys(schema)}
    texts = {
        key
        for key, hint in hints.items()
        if hint is str or set(typing.get_args(hint)) == {str, type(None)}
    }
    tables = [key for key, hint in hints.items() if typing.get_origin(hint) is dict]
    overrides, raw, waiting = [], {}, list(positional)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        is_key = key.lstrip("+~").replace(".", "").replace("_", "").replace("/", "").isalnum()
        is_there = key not in hints and os.path.exists(argument)  # a folder such as runs/lr=0.1
        if waiting and (is_there or not (equals and is_key)):
            key, equals, value = waiting.pop(0), "=", argument
            argument = f"{key}={value}"
        if argument.startswith("-") or not equals and not argument.startswith("~"):
            raise ConfigError(
                f"'{argument}' is not understood. Settings are written key=value; "
                "--help lists the keys."
            )
        # `+` adds a key the schema does not know: only a table (dict) takes new keys, and there it
        # may be left out.
        is_open = any(
            key.lstrip("+") == table or key.lstrip("+").startswith(f"{table}.") for table in tables
        )
        argument = ("++" if is_open else "") + argument.lstrip("+")
        if key in texts and value not in ("null", "???"):
            if key.rpartition(".")[2] in PATHS:
                _check_path(key, value)
            raw[key] = value
        else:
            overrides.append(argument)
    return overrides, raw


def _check_path(key: str, value: str) -> None:
    """Refuse what a shell has left of a path: nothing, or a `~` that it did not expand.

    Taken literally, an empty fallback is none, and `~/runs` a folder called ~ in the present one.
    """
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


def _explain(error: Exception, schema: type) -> str:
    """Hydra's complaint in one message: key, what is wrong, the nearest right key or the type."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue

    cause: Any = error.__cause__ if error.__cause__ is not None else error
    first_line = str(cause).strip().splitlines()[0]
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = ", ".join(error.options)
        nearest = _nearest(option, error.options)
        return f"{group}={option}: there is no such option.{nearest} Options: {options}."
    if isinstance(error, OverrideParseException):
        return (
            f"'{error.override}' is not understood: {first_line}. "
            "Quote special characters: key=\"'value'\"."
        )
    if "Ambiguous value" in first_line:
        return f"{first_line}: give one value; a list is written key=[a,b]."
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        # "Could not override 'data.train'."
        place = next(iter(str(error).split("'")[1::2]), cause.full_key)
        inside = f"{place}: " if place != cause.full_key else ""
        section = str(cause.full_key).removesuffix(str(cause.key))
        owner = cause.object_type
        known = (
            [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
        )
        elsewhere = [k for k, _, _ in keys(schema) if k.split(".")[-1] == str(cause.key)]
        hint = (
            f" Did you mean {elsewhere[0]}?"
            if elsewhere
            else _nearest(str(cause.key), known, section)
        )
        hint = hint or " --help lists the settings."
        return f"{inside}there is no setting '{cause.full_key}'.{hint}"
    if isinstance(cause, MissingMandatoryValue):
        lines = [
            line.split(":", 1)[1].strip() for line in str(cause).splitlines() if "full_key" in line
        ]
        unset = lines[0] if lines else first_line.split("missing mandatory value:")[-1].strip()
        return f"{unset} is not set and has no default; give {unset}=..."
    if cause is not error:
        return f"{str(error).splitlines()[0].replace('Error merging override ', '')}: {first_line}"
    return str(error).strip()


def _nearest(word: str, legal: Sequence[str], section: str = "") -> str:
    near = difflib.get_close_matches(word, legal, n=1, cutoff=0.6)
    return f" Did you mean {section}{near[0]}?" if near else ""


def help_text(main: Callable, schema: type, *, config: str, positional: Sequence[str]) -> str:
    """Module docstring, groups of conf/, and every field with its default and its documentation."""
    module = sys.modules[main.__module__]
    lines = [inspect.cleandoc(module.__doc__ or ""), ""]
    if (CONF_DIR / f"{config}.yaml").exists() and config == "pretrain":
        lines.append("Groups (group=option):")
        sections = {field.name for field in dataclasses.fields(schema)} | {"experiment"}
        for folder in sorted(
            p for p in CONF_DIR.iterdir() if p.name in sections and any(p.glob("*.yaml"))
        ):
            options = ", ".join(sorted(f.stem for f in folder.glob("*.yaml")))
            lines += textwrap.wrap(
                f"{folder.name}: {options}", 110, initial_indent="  ", subsequent_indent="      "
            )
        lines.append("")
    lines.append("Settings (key=value); --cfg prints the composed config instead of running.")
    for key, field, owner in keys(schema):
        if dataclasses.is_dataclass(typing.get_type_hints(owner)[field.name]):
            continue
        mark = " (may be given without its name)" if key in positional else ""
        lines.append(f"  {key} = {_default(field)}{mark}")
        if documentation := field_docs(owner).get(field.name):
            lines += textwrap.wrap(
                documentation, 110, initial_indent="      ", subsequent_indent="      "
            )
    return "\n".join(lines)


def _default(field: dataclasses.Field) -> str:
    """A field's default as --help shows it, with the choices of an enum."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if isinstance(value, Enum):
        return f"{value.name}   ({' | '.join(m.name for m in type(value))})"
    if value is dataclasses.MISSING or value == "???":
        return "(required)"
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def field_docs(owner: type) -> dict[str, str]:
    """Field name to the string literal under it in the source of a dataclass."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    assert isinstance(tree.body[0], ast.ClassDef)
    docs, last = {}, ""
    for node in tree.body[0].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and last:
            docs[last] = " ".join(str(node.value.value).split())
    return docs
