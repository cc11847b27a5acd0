"""The points of a sweep: settings with several values, by Hydra's own sweeper grammar.

    optimizer.lr=1e-3,3e-4 model=glob(tiny*) --points_of--> Point(number, settings, words), ...

A comma list, choice(...), range(...), glob(...) of a group of presets, shuffle and sort; the points
are their product, the last setting changing fastest. A list in brackets is one value.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from pipeline import cli, presets
from pipeline.config.pretrain import PretrainConfig
from pipeline.errors import ConfigError

MOST = 1000
"""Points of a sweep: more are a mistyped range."""
LONGEST_NAME = 80
# Of a word that may have several values; any other is handed on as it was typed.
SEVERAL = re.compile(r",|\b(?:choice|range|glob|interval|shuffle|sort|tag)\(")


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    number: int
    settings: dict[str, str]
    """Those that differ between the points, in the order in which they were given."""
    words: list[str]
    """Every setting, but runs_dir and name."""

    @property
    def name(self) -> str:
        """Of its run: the number and, as far as a folder's name holds them, its settings."""
        said = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.settings.items())
        return f"{self.number:03d}-{re.sub(r'[^A-Za-z0-9_.=,-]+', '_', said)}"[:LONGEST_NAME]


def points_of(words: Sequence[str]) -> list[Point]:
    """The points that settings of pipeline.train span.

    Raises:
        ConfigError: a word cannot be parsed, none has several values, one is given twice, or there
            are too many points.
    """
    rest, own = presets.take_folder(words, cli.CONF_DIR)
    kept = [f"{presets.FLAG}={own}"] if own else []
    fixed, swept = list[str](), list[list[str]]()
    for word in rest:
        values = _values(word, own) if SEVERAL.search(word) else []
        swept += [values] if values else []
        fixed += [] if values else [word]
    if not swept:
        raise ConfigError(
            "no setting has several values, so there is nothing to sweep. Give them with commas, "
            "as optimizer.lr=1e-3,3e-4, or a range: model.num_layers='range(2,9,2)'."
        )
    several = {values[0].partition("=")[0] for values in swept}
    named = [word.partition("=")[0].lstrip("+") for word in rest]
    if twice := sorted(key for key in several if named.count(key.lstrip("+")) > 1):
        raise ConfigError(
            f"{', '.join(twice)} is given twice, and one of the two would have no effect: name all "
            "of its values in one word."
        )
    found = list(itertools.islice(itertools.product(*swept), MOST + 1))
    if len(found) > MOST:
        raise ConfigError(f"a sweep has at most {MOST} points. Give fewer values.")
    return [
        Point(
            number,
            dict(word.split("=", 1) for word in chosen),
            [*kept, *fixed, *chosen],
        )
        for number, chosen in enumerate(found)
    ]


def _values(word: str, own: Any) -> list[str]:
    """The words that one word stands for, as Hydra's sweeper takes it; none where it is no sweep.

    Raises:
        ConfigError: it cannot be parsed, or is a sweep of another sweeper.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    folders = [cli.CONF_DIR, *([own] if own else [])]
    groups = presets.groups(PretrainConfig, "pretrain", folders)
    # What the parser asks for a glob.
    loader: Any = SimpleNamespace(get_group_options=lambda group, *_, **__: groups.get(group, []))
    try:
        (override,) = OverridesParser.create(config_loader=loader).parse_overrides([word])
        if not override.is_sweep_override():
            return []
        if not override.is_discrete_sweep():
            raise ConfigError(
                f"'{word}' has no end of values. Give a range with a step, or a list."
            )
        key = override.get_key_element()
        found = [f"{key}={value}" for value in override.sweep_string_iterator()]
    except HydraException as error:
        raise ConfigError(
            f"'{word}' is not understood: {str(error).splitlines()[0]}. Several values are "
            f"key=a,b; one with a comma in it is key=\\'a,b\\'."
        ) from None
    if not found:
        raise ConfigError(f"'{word}' fits no value. Known: {', '.join(groups.get(key, []))}.")
    return found
