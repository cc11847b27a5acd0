"""Where presets and recipes come from: this project's conf/, and a folder of the user's own.

--config-dir DIR, PRETRAIN_CONFIG_DIR, conf/ in the working directory: the first of them
                                                         --take_folder--> searched behind ours
conf/, DIR --groups--> group to names, for --help and suggestions
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

FLAG = "--config-dir"
VARIABLE = "PRETRAIN_CONFIG_DIR"
"""The same for a command and whatever it composes or starts itself, as a scaling ladder does."""
COMPOSING = threading.Lock()
"""Held by the thread whose Hydra it is."""


def take_folder(arguments: Sequence[str], ours: Path) -> tuple[list[str], Path | None]:
    """The words without --config-dir, and the user's folder of presets; None: there is none.

    Raises:
        ConfigError: it is no folder, or one of its files has the name of one of ours.
    """
    rest, own = [], None
    words = iter(arguments)
    for word in words:
        if word.partition("=")[0] != FLAG:
            rest.append(word)
            continue
        named = word.partition("=")[2] if "=" in word else next(words, "")
        own = Path(named)
        if not named or not own.is_dir():
            raise ConfigError(
                f"{FLAG} {named} is no folder. It holds presets as conf/ does: "
                f"{FLAG} DIR, DIR/experiment/mine.yaml, and experiment=mine."
            )
    if own is None and (handed_on := os.environ.get(VARIABLE)):
        own = Path(handed_on)
        if not own.is_dir():
            raise ConfigError(f"{VARIABLE}={own} is no folder of presets. Unset it, or mend it.")
    own = own or Path("conf")
    if not own.is_dir() or own.resolve() == ours.resolve():
        return rest, None
    for theirs in _clashes(own, ours):
        raise ConfigError(
            f"{theirs} has the name of a preset of this program, and one of the two would be "
            f"passed over. Rename it, or give another folder with {FLAG} DIR."
        )
    return rest, own.resolve()


def _clashes(own: Path, ours: Path) -> Iterator[Path]:
    """Files of `own` whose name means another content of ours."""
    for path in sorted([*ours.glob("*.yaml"), *ours.glob("*/*.yaml")]):
        theirs = own / path.relative_to(ours)
        if theirs.is_file() and theirs.read_bytes() != path.read_bytes():
            yield theirs


def groups(schema: type, config: str, folders: Sequence[Path]) -> dict[str, list[str]]:
    """The presets of a command by group: folders that are its sections, or have its own name."""
    sections = {field.name for field in dataclasses.fields(schema)} | {config}
    sections |= {"experiment"} if config == "pretrain" else set()
    found = {
        section: sorted({f.stem for folder in folders for f in folder.glob(f"{section}/*.yaml")})
        for section in sorted(sections)
    }
    return {group: options for group, options in found.items() if options}


def search_path(own: Path) -> str:
    """Hydra's override that searches a folder too."""
    quoted = str(own).replace("\\", "\\\\").replace("'", "\\'")
    return f"hydra.searchpath=['file://{quoted}']"


def check_no_hydra_setting(argument: str) -> None:
    """Where to look for presets is all that Hydra may be told.

    Raises:
        ConfigError: this would have no effect.
    """
    key = argument.lstrip("+~").partition("=")[0]
    if key.startswith(("hydra.", "hydra/")) and key != "hydra.searchpath":
        raise ConfigError(_of_hydras(f"'{argument}'"))


def take_hydras_section(node: DictConfig) -> None:
    """Take out of what Hydra composed its own section, in which presets have nothing to tell it.

    Raises:
        ConfigError: a preset does.
    """
    from omegaconf import OmegaConf, open_dict

    with open_dict(node):
        told: Any = OmegaConf.to_container(node.pop("hydra"))
    plain: Any = OmegaConf.to_container(_hydras_own())
    for key in sorted(told.keys() - {"overrides", "runtime", "searchpath"}):
        # Hydra fills in those above, and these of the job.
        for filled in ("name", "override_dirname", "config_name") if key == "job" else ():
            told[key][filled] = plain[key][filled]
        if told[key] != plain[key]:
            raise ConfigError(_of_hydras(f"hydra.{key} in a preset"))


def _of_hydras(setting: str) -> str:
    return (
        f"{setting} is a setting of Hydra's, which composes settings here and runs nothing: "
        "it has no effect. Runs of several values: python -m pipeline.sweep. "
        "--help lists the settings."
    )


@functools.cache
def _stored(name: str, schema: type) -> dict[str, Any]:
    """What Hydra finds besides yaml files: the schema, and its own settings.

    Without those by which it runs programs, which were half of what it composed, and without the
    schemas of other commands: Hydra copies all that is stored each time.
    """
    from hydra.core.config_store import ConfigNode
    from omegaconf import OmegaConf

    def node(name: str, value: DictConfig, group: str | None) -> dict[str, ConfigNode]:
        return {name: ConfigNode(name, value, group, package=None, provider=None)}

    ours = node(f"{name}.yaml", OmegaConf.structured(schema), None)
    return {**ours, "hydra": node("config.yaml", _hydras_own(), "hydra")}


@functools.cache
def _hydras_own() -> DictConfig:
    """Hydra's settings as they are stored for it, and as long as nobody tells it anything."""
    from hydra.conf import HydraConf
    from omegaconf import OmegaConf

    return OmegaConf.structured(HydraConf(defaults=[]))


@contextlib.contextmanager
def hydra_in(folder: Path, name: str, schema: type) -> Iterator[None]:
    """Hydra over a folder of presets whose defaults name a schema, for this thread alone.

    A process has one Hydra and one store of schemas: two threads that compose refuse each other,
    and so does an application under @hydra.main that calls us; its own are set aside and put back.
    """
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins

    with COMPOSING:
        Plugins.instance()  # when they are first loaded they store settings of theirs
        store = ConfigStore.instance()
        theirs, their_hydra = store.repo, GlobalHydra.instance().hydra
        store.repo = _stored(name, schema)
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(folder), version_base="1.3"):
                yield
        finally:
            store.repo = theirs
            GlobalHydra.instance().clear()
            if their_hydra is not None:
                GlobalHydra.instance().initialize(their_hydra)
