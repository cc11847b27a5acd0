"""Canaries: made-up secrets in a template, planted in a training split to measure what is learned.

    seed, template --draw--> Canary(text with a random secret, repetitions)
    copies --places--> unit, byte of its text after which the copy comes
    OUT/canaries.json   the sealed list, for pipeline.memorization

Places follow from seed and units alone, so any number of workers and tasks plants alike. Nothing of
a canary is in the manifest but its tokens.
Source: Carlini et al. 2019, arXiv:1802.08232.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources.inputs import Unit
from pipeline.data.canary_list import CANARIES, Canary, draw_secret, fill
from pipeline.data.shard_format import UNSEALED, seal
from pipeline.errors import ConfigError
from pipeline.files import write_durably

MOST_COPIES = 1_000_000  # the list of places is made in every worker


@dataclass
class CanaryConfig:
    """Canaries to plant; none with each=0."""

    each: int = 0
    """Canaries at each number of repetitions, and as many that are never planted; 0: none."""
    repetitions: list[int] = field(default_factory=lambda: [1, 4, 16, 64])
    """How often each of them is planted; canaries of their own at every number."""
    template: str = "The key of vault {name} is {secret}."
    """Text of a canary: {name} becomes six random letters, {secret} twelve random digits."""
    seed: int = 0
    """Of names, secrets and places: who knows it knows the secrets."""


def check(cfg: CanaryConfig) -> None:
    """Refuse what cannot be planted.

    Raises:
        ConfigError: numbers below 1, or a template that does not hold each part once, name first.
    """
    if cfg.each < 0 or not cfg.repetitions or min(cfg.repetitions) < 1:
        raise ConfigError(
            f"canaries.each ({cfg.each}) must be at least 0, and canaries.repetitions "
            f"({cfg.repetitions}) numbers from 1 on: canaries that are never planted are drawn "
            "anyway."
        )
    if len(set(cfg.repetitions)) < len(cfg.repetitions):
        raise ConfigError(f"canaries.repetitions ({cfg.repetitions}) names a number twice.")
    if (copies := cfg.each * sum(cfg.repetitions)) > MOST_COPIES:
        raise ConfigError(f"{copies:,} copies of canaries are more than {MOST_COPIES:,}.")
    if [cfg.template.count(part) for part in ("{name}", "{secret}")] != [1, 1] or (
        cfg.template.index("{name}") > cfg.template.index("{secret}")
    ):
        raise ConfigError(
            f"canaries.template ({cfg.template!r}) must hold {{name}} and then {{secret}}, once "
            "each: the secret is asked for by what comes before it."
        )


def draw(cfg: CanaryConfig) -> list[Canary]:
    """All canaries, those that are never planted first; the same for the same settings."""
    random = np.random.default_rng([cfg.seed, 0x5EC2E7])
    found = []
    for repetitions in [0, *cfg.repetitions]:
        for _ in range(cfg.each):
            name = "".join(chr(97 + i) for i in random.integers(0, 26, 6))
            found.append(Canary(name, draw_secret(random), repetitions))
    return found


def places(cfg: CanaryConfig, units: Sequence[Unit]) -> dict[int, list[tuple[int, str]]]:
    """Unit number to [(bytes of text before it, canary's text)], ascending.

    Each copy gets a byte of the whole input, drawn evenly; of compressed files, whose text is
    longer than they are, copies come in the first part of a unit.
    """
    texts = [fill(cfg.template, c.name, c.secret) for c in draw(cfg) for _ in range(c.repetitions)]
    random = np.random.default_rng([cfg.seed, 0x91ACE])
    ends = np.cumsum([max(unit.weight, 1) for unit in units])
    drawn = random.integers(0, ends[-1], len(texts))
    found: dict[int, list[tuple[int, str]]] = {}
    for byte, text in sorted(zip(drawn.tolist(), texts)):
        index = int(np.searchsorted(ends, byte, "right"))
        before = int(ends[index - 1]) if index else 0
        found.setdefault(units[index].number, []).append((byte - before, text))
    return found


def write_list(cfg: CanaryConfig, output: Path) -> None:
    """Write OUT/canaries.json, for its owner's eyes only."""
    content: dict[str, Any] = {
        "format": "canaries",
        "checksum": UNSEALED,
        "template": cfg.template,
        "canaries": [asdict(canary) for canary in draw(cfg)],
    }
    sealed = seal((json.dumps(content, indent=1) + "\n").encode())
    write_durably(output / CANARIES, sealed, mode=0o600)
