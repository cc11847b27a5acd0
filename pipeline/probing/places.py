"""Places of a model whose activations can be written down, by canonical name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.errors import ConfigError

PLACE = re.compile(r"embedding|layers\.(\d+)(?:\.(self_attention|mlp))?")


@dataclass(frozen=True)
class Place:
    """Where a (B, S, H) value is read."""

    block: int
    part: str
    """`input`, `block` (its output), `self_attention` or `mlp` (what they add)."""

    @classmethod
    def of(cls, name: str, *, num_layers: int) -> Place:
        """The place of a name: embedding, layers.5, layers.5.self_attention, layers.5.mlp.

        Raises:
            ConfigError: the model has no such place.
        """
        match = PLACE.fullmatch(name)
        if match is None or (match[1] and int(match[1]) >= num_layers):
            last = num_layers - 1
            raise ConfigError(
                f"place={name} is none of this model: there are embedding (the stream before the "
                f"first block), layers.0 to layers.{last} (the stream after a block), and "
                f"layers.{last}.self_attention, layers.{last}.mlp (what they add to it)."
            )
        if match[1] is None:
            return cls(0, "input")
        return cls(int(match[1]), match[2] or "block")
