"""From the words on a command line to one typed config, or to one clear message.

    argv --split--> positional words, raw strings, hydra overrides
         --compose conf/ + schema--> dataclass --> main(cfg)

Every entry point of the project is `cli.run(main, Schema, config="name")`. `--help` prints the
module's docstring and each setting with its composed value and its meaning; it needs no torch.
Beside it only presets.py and the sweep's grammar import hydra.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pipeline import completion, log, presets, suggestions
from pipeline import schema as schemas
from pipeline.errors import ConfigError, PipelineError, of_the_machine, printed
from pipeline.files import own_compiled_code
from pipeline.help_page import help_text
from pipeline.redaction import redact

if TYPE_CHECKING:
    from omegaconf import DictConfig

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
    try:
        code = _run(main, schema, config=config, positional=positional)
        log.flush_output()
        sys.exit(code)
    except KeyboardInterrupt:  # of a command that has nothing to save; training hears it itself
        log.say("\ninterrupted")
        sys.exit(128 + signal.SIGINT)
    except PipelineError as error:
        log.say(printed(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `... | head`: who reads has enough
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if (refused := of_the_machine(error)) is None:
            raise
        log.say(printed(refused))
        sys.exit(refused.exit_code)
    finally:
        with contextlib.suppress(OSError):
            log.flush_output()


def _run(
    main: Callable[[T], int | None], schema: type[T], *, config: str, positional: Sequence[str]
) -> int:
    """Do what the command line says: complete a word, help, show the config, or call main."""
    arguments = sys.argv[1:]
    if arguments[:1] == [completion.ASK]:
        groups = presets.groups(schema, config, _folders(None)) if _has_yaml(config) else {}
        return completion.answer(arguments[-1], schema, groups)
    if {"-h", "--help"} & set(arguments):
        words = [a for a in arguments if a not in ("-h", "--help")]
        return _help(main, schema, words, config=config, positional=positional)
    if presets.FLAG in {a.partition("=")[0] for a in arguments} and _has_yaml(config):
        arguments, own = presets.take_folder(arguments, CONF_DIR)
        os.environ[presets.VARIABLE] = str(own or CONF_DIR)  # also for what it starts
    words = [a for a in arguments if a != "--cfg"]
    cfg = compose(schema, words, config=config, positional=positional)
    if len(words) < len(arguments):
        print(to_yaml(cfg), end="")
        return 0
    own_compiled_code()
    return main(cfg) or 0


def _help(
    main: Callable, schema: type, words: Sequence[str], *, config: str, positional: Sequence[str]
) -> int:
    """Print the page with the values that `words` compose; 2 where they compose nothing."""
    problem, own = "", None
    try:
        own = presets.take_folder(words, CONF_DIR)[1]
        values = composed_values(schema, words, config, positional)
    except ConfigError as error:  # who asks for help next to a mistake still gets the page
        problem, values = printed(error), composed_values(schema, [], config, positional)
    groups = presets.groups(schema, config, _folders(own)) if _has_yaml(config) else {}
    print(help_text(main, schema, groups=groups, values=values, positional=positional))
    if problem:
        log.say(problem)
    return 2 if problem else 0


def composed_values(
    schema: type, words: Sequence[str], config: str, positional: Sequence[str]
) -> dict[str, Any]:
    """Composed values, enums by name; what has none is `???`. Without presets it needs no hydra."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if words or _has_yaml(config):
        node = _compose(schema, words, config=config, positional=positional)
    else:
        node = OmegaConf.structured(schema)
    try:
        values = OmegaConf.to_container(node, resolve=True, enum_to_str=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, schema)) from error
    return typing.cast("dict[str, Any]", values)


def _folders(own: Path | None) -> list[Path]:
    return [CONF_DIR, own] if own else [CONF_DIR]


def _has_yaml(config: str) -> bool:
    return (CONF_DIR / f"{config}.yaml").exists()


def compose(
    schema: type[T], arguments: Sequence[str], *, config: str, positional: Sequence[str] = ()
) -> T:
    """The dataclass that conf/<config>.yaml, its groups and the command-line words give.

    Raises:
        ConfigError: unknown key, wrong type, unknown option, or a required value that is not set.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    node = _compose(schema, arguments, config=config, positional=positional)
    if missing := OmegaConf.missing_keys(node):
        order = dict.fromkeys([*positional, *(key for key, *_ in schemas.keys(schema))])
        unset = [key for key in order if key in missing] or sorted(missing)  # of an entry of a list
        give = " ".join(f"{key}=..." for key in unset)
        rule = "are not set and have no default" if unset[1:] else "is not set and has no default"
        raise ConfigError(f"{', '.join(unset)} {rule}; give {give}")
    try:
        return typing.cast(T, OmegaConf.to_object(node))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, schema)) from error


def _compose(
    schema: type, arguments: Sequence[str], *, config: str, positional: Sequence[str]
) -> DictConfig:
    """The settings before they become dataclasses; some may still have no value."""
    from hydra import compose as hydra_compose
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    groups: dict[str, list[str]] = {}
    own: Path | None = None
    if _has_yaml(config):
        arguments, own = presets.take_folder(arguments, CONF_DIR)
        groups = presets.groups(schema, config, _folders(own))
    overrides, raw = _split(arguments, schema, positional, groups)
    for path in [path for folder in _folders(own) for path in folder.rglob("*.yaml")]:
        if not path.is_file():  # a pipe would be waited for, without end
            raise ConfigError(f"{path} is not an ordinary file; take it out of conf/.")
    # A yaml file names its schema first in `defaults`; a job without one is its schema.
    name = f"{config}_schema" if _has_yaml(config) else config
    try:
        with presets.hydra_in(CONF_DIR, name, schema):
            search = [presets.search_path(own)] if own else []
            node = hydra_compose(config, [*search, *overrides], return_hydra_config=True)
        presets.take_hydras_section(node)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, schema)) from error
    except (YAMLError, OSError, ValueError, TypeError, RecursionError) as error:
        # Of a preset in conf/; yaml's own errors name the file and the line.
        where = " or ".join(map(str, _folders(own)))
        raise ConfigError(f"a file of {where} cannot be read: {error}") from error
    try:
        for key, value in raw.items():
            OmegaConf.update(node, key, literal(value))
        return node
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


def _split(
    arguments: Sequence[str],
    schema: type,
    positional: Sequence[str],
    groups: Mapping[str, Sequence[str]],
) -> tuple[list[str], dict[str, str]]:
    """Hydra's overrides, and the values of `str` fields, at whatever depth.

    Those are taken as they are: Hydra's grammar would trip over their commas, quotes and braces.
    """
    hints = {
        key: schemas.type_hints(owner)[field.name] for key, field, owner in schemas.keys(schema)
    }
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
            raise ConfigError(_not_key_value(argument, schema, groups))
        presets.check_no_hydra_setting(argument)
        # `+` adds a key the schema does not know: only a table (dict) takes new keys, and there it
        # may be left out.
        is_open = any(
            key.lstrip("+") == table or key.lstrip("+").startswith(f"{table}.") for table in tables
        )
        argument = ("++" if is_open else "") + argument.lstrip("+")
        if key in texts and value not in ("null", "???"):
            schemas.check_path(key, value)
            raw[key] = value
        else:
            overrides.append(argument)
    return overrides, raw


def _not_key_value(argument: str, schema: type, groups: Mapping[str, Sequence[str]]) -> str:
    """What to say of a word that is no `key=value`: a flag of another program, or a preset."""
    key, _, value = argument.partition("=")
    meant = [f"{group}={key}" for group, options in groups.items() if key in options]
    hint = suggestions.did_you_mean(meant) or suggestions.for_setting(key, schema)
    if not meant and hint.endswith("?"):
        hint = f"{hint[:-1]}={value or '...'}?"
    return (
        f"'{argument}' is not understood. Settings are written key=value; --help lists the keys."
        + hint
    )


def _explain(error: Exception, schema: type) -> str:
    """Hydra's complaint in one message: key, what is wrong, the nearest right key or the type."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    cause: Any = error.__cause__ if error.__cause__ is not None else error
    first_line = str(cause).strip().splitlines()[0]
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = ", ".join(error.options)
        nearest = suggestions.for_option(option, error.options)
        return f"{group}={option}: there is no such option.{nearest} Options: {options}."
    if isinstance(error, OverrideParseException):
        return (
            f"'{error.override}' is not understood: {first_line}. "
            "Quote special characters: key=\"'value'\"."
        )
    if "Ambiguous value" in first_line:
        return (
            f"{first_line}: give one value; a list is written key=[a,b]. A run for each of several "
            "values of a setting of training: python -m pipeline.sweep."
        )
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        # "Could not override 'data.train'."
        place = next(iter(str(error).split("'")[1::2]), cause.full_key)
        inside = f"{place}: " if place != cause.full_key else ""
        section = str(cause.full_key).removesuffix(str(cause.key))
        owner = cause.object_type
        known = (
            [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
        )
        beside = [section + name for name in known]
        hint = suggestions.for_setting(str(cause.full_key), schema, section=beside)
        hint = hint or " --help lists the settings."
        return f"{inside}there is no setting '{cause.full_key}'.{hint}"
    if cause is not error:
        return f"{str(error).splitlines()[0].replace('Error merging override ', '')}: {first_line}"
    key = getattr(error, "full_key", None)
    return f"{key}: {first_line}" if key and key not in first_line else first_line
