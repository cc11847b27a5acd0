"""The list of canaries beside a dataset: what data_prep has planted, for pipeline.memorization.

OUT/canaries.json -> template, [Canary]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.shard_format import is_sealed
from pipeline.errors import DataError
from pipeline.files import read_file
from pipeline.shapes import COUNT, parse_object

CANARIES = "canaries.json"
DIGITS = 12
_SHAPE = {
    "format": str,
    "template": str,
    "canaries": [{"name": str, "secret": str, "repetitions": COUNT}],
}


@dataclass(frozen=True)
class Canary:
    """A made-up secret under a name."""

    name: str
    secret: str
    repetitions: int
    """How often it was planted; 0: it is in no document."""


def draw_secret(random: np.random.Generator) -> str:
    """DIGITS random digits in groups of three: a tokenizer cuts them alike, whatever they are."""
    digits = "".join(map(str, random.integers(0, 10, DIGITS)))
    return " ".join(digits[i : i + 3] for i in range(0, DIGITS, 3))


def fill(template: str, name: str, secret: str) -> str:
    """The text of a canary."""
    return template.replace("{name}", name).replace("{secret}", secret)


def read_list(path: Path) -> tuple[str, list[Canary]]:
    """(template, canaries) of a list.

    Raises:
        DataError: it cannot be read, or is not as it was written.
    """
    try:
        raw = read_file(path)
    except OSError as error:
        raise DataError(f"the list of canaries {path} cannot be read: {error}.") from None
    content = parse_object(
        raw,
        _SHAPE,
        name=f"the list of canaries {path}",
        error=DataError,
        misfit="is not what data_prep/tokenize.py writes",
    )
    if not is_sealed(raw):
        raise DataError(
            f"{path} is not as data_prep/tokenize.py wrote it: its checksum is another. Take the "
            "list that was written beside the dataset."
        )
    return content["template"], [Canary(**canary) for canary in content["canaries"]]
