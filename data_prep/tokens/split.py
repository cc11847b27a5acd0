"""Which documents are held out, and the parts of one work unit: a writer for each split.

document -> digest of its content -> below fraction * 2^64: validation, else train -> PartWriter
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.tokens.shard_writer import PARTS_PER_KEY_RANGE, PartWriter
from pipeline.data.shard_format import ShardLayout
from pipeline.errors import ConfigError

SPLITS = ("train", "validation")
SPLIT_CHARACTERS = 4096  # that decide, with the length, to which split a document goes


def check_fraction(fraction: float) -> None:
    """Refuse a share that leaves nothing to train on.

    Raises:
        ConfigError: it is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"validation_fraction ({fraction}) must be at least 0 and below 1.")


def digest_text(text: str) -> int:
    """A number below 2^64; the same for texts that begin alike and are equally long."""
    return _digest(f"{len(text)} {text[:SPLIT_CHARACTERS]}".encode())


def digest_ids(ids: np.ndarray) -> int:
    """A number below 2^64 of a document's ids, without the end-of-document id."""
    return _digest(ids.astype("<u4").tobytes())


def digest_pixels(image: np.ndarray) -> int:
    """A number below 2^64 of a picture's pixels: all that is said of one picture stays together."""
    return _digest(image.tobytes())


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def documents_in(result: dict[str, Any], split: str) -> int:
    """Documents of a split, by a unit's marker; the padding of packed rows is none."""
    if "dialogues" in result:
        return int(result["dialogues"][split])
    return sum(part["documents"] for part in result["splits"][split]["parts"])


def is_held_out(digest: int, fraction: float) -> bool:
    """True for `fraction` of all digests; with a larger one, what was held out stays so."""
    return digest < fraction * 2**64


class UnitWriter:
    """The parts of one work unit by split, and what its marker says of them.

    Used as a context manager: left with an error, the parts that were being written are removed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        number: int,
        source: str,
        layout: ShardLayout,
        fraction: float,
        stem: str = "",
    ) -> None:
        """Write into `folder`.

        Args:
            folder: of the parts.
            number: of the unit; parts are named and keyed by it.
            source: label of the unit.
            layout: of the blocks.
            fraction: share that is held out; 0: there is no validation split.
            stem: of the names of the parts; empty: the number.
        """
        self._fraction = fraction
        self._count, self._planted = dict.fromkeys(SPLITS, 0), 0
        self._lowest: dict[
            str, dict[str, Any]
        ] = {}  # by split: the documents with its least digest
        self._writers = {
            name: PartWriter(
                folder,
                stem=f"{stem or f'{number:08d}'}-{name}",
                key=number * PARTS_PER_KEY_RANGE,
                source=source,
                layout=layout,
            )
            for name in SPLITS[: 2 if fraction else 1]
        }
        self._text_bytes = dict.fromkeys(self._writers, 0)
        self._stack = ExitStack()

    def __enter__(self) -> UnitWriter:
        """Nothing is written yet."""
        for writer in self._writers.values():
            self._stack.enter_context(writer)
        return self

    def __exit__(self, *error: Any) -> None:
        """Remove unfinished parts, if an error ended the block."""
        self._stack.__exit__(*error)

    def split_of(self, digest: int, name: str, size: Callable[[], int]) -> str:
        """The split of the unit's next document.

        The train documents that come nearest to being held out are noted in the marker, and the
        held-out ones of the lowest digest: a small corpus may have nothing in the other split, and
        then one of these goes there (held_out.py).

        Args:
            digest: of its content.
            name: its id.
            size: gives the UTF-8 bytes of its text.
        """
        split = "validation" if is_held_out(digest, self._fraction) else "train"
        place, self._count[split] = self._count[split], self._count[split] + 1
        lowest = self._lowest.get(split)
        if self._fraction and (lowest is None or digest <= lowest["digest"]):
            if lowest is None or digest < lowest["digest"]:
                lowest = {"digest": digest, "documents": [], "ids": [], "text_bytes": 0}
                self._lowest[split] = lowest
            lowest["documents"].append(place)
            lowest["ids"].append(name)
            lowest["text_bytes"] += size()
        return split

    def plant(self) -> None:
        """Count a train document that is none of the input's, and is never held out."""
        self._count["train"] += 1
        self._planted += 1

    def add(
        self,
        split: str,
        tokens: np.ndarray,
        starts: np.ndarray,
        ids: list[str],
        text_bytes: int,
        loss: np.ndarray | None = None,
        images: np.ndarray | None = None,
    ) -> None:
        """Append whole documents to a split.

        Args:
            split: one of SPLITS.
            tokens: (n,) ids, each document with its end-of-document id, or whole packed rows.
            starts: places in `tokens` where documents start.
            ids: of these documents.
            text_bytes: UTF-8 bytes of their text.
            loss: (n,) uint8, of packed rows.
            images: as PartWriter.add takes them.
        """
        self._writers[split].add(tokens, starts, ids, loss, images)
        self._text_bytes[split] += text_bytes

    def close(self) -> dict[str, Any]:
        """Finish all parts; `splits`, `nearest`, `held` and `planted` of the unit's marker."""
        splits = {
            name: {
                "parts": [part.as_json() for part in writer.close()],
                "text_bytes": self._text_bytes[name],
            }
            for name, writer in self._writers.items()
        }
        lowest = self._lowest
        return {
            "splits": splits,
            "nearest": lowest.get("train"),
            "held": lowest.get("validation"),
            **({"planted": self._planted} if self._planted else {}),
        }
