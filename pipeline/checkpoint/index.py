"""Which tensors a checkpoint holds, and where: tensors.json, read and checked, without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoint.folder import INDEX
from pipeline.checkpoint.rectangles import Entry, Rectangle, check_filled
from pipeline.errors import CheckpointError
from pipeline.files import parse_json, read_file, regular_file

FORMAT = "pretrain-tensors"
VERSION = 2
MOST_INDEX_BYTES = 1 << 30  # a thousand ranks with a share of 10,000 tensors write 0.6 GB


class TensorIndex:
    """Names and shapes of the tensors of one checkpoint folder; CheckpointTensors has the rest."""

    def __init__(self, folder: Path) -> None:
        """Read it; of a checkpoint of version 1 by torch."""
        self.folder = folder
        self._load_version_1: Callable[[Any], Any] | None = None
        if (folder / INDEX).exists():
            self._entries = read_index(folder / INDEX)
            self._check_sizes()
            return
        from pipeline.checkpoint import dcp  # 1 s of CPU, for old checkpoints alone

        stored, self._load_version_1 = dcp.open_version_1(folder)
        self._entries = {
            name: Entry(shape, [Rectangle(*part) for part in parts])
            for name, (shape, parts) in stored.items()
        }

    def _check_sizes(self) -> None:
        """Refuse an index of more than the files hold, before memory is asked for it."""
        places = {r.place[0] for entry in self._entries.values() for r in entry.rectangles}
        try:
            held = sum(regular_file(self.folder / name).stat().st_size for name in places)
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}.") from None
        told = 4 * sum(math.prod(entry.shape) for entry in self._entries.values())
        if told > held:
            raise CheckpointError(f"{self.folder / INDEX}: {told} bytes, its files have {held}.")

    @property
    def names(self) -> list[str]:
        """Every entry, such as weights/final_norm.weight."""
        return sorted(self._entries)

    @property
    def parameters(self) -> list[str]:
        """Canonical names of the weights."""
        return [name.partition("/")[2] for name in self.names if name.startswith("weights/")]

    @property
    def optimizer_keys(self) -> list[str]:
        """Kinds of optimizer state that were saved: exp_avg, exp_avg_sq for AdamW."""
        return sorted({name.partition("/")[0] for name in self.names} - {"weights"})

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole shape of an entry."""
        return self._entry(name).shape

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(
                f"{self.folder} has no {name}. It was written by a model with other parameters; "
                f"compare `python -m pipeline.checkpoint show {self.folder}`."
            )
        return self._entries[name]


def key_of(name: str, offsets: Sequence[int]) -> str:
    """Name of a rectangle in its file: the entry and the rectangle's first corner."""
    return f"{name}@{','.join(map(str, offsets))}"


def file_name(number: int) -> str:
    """Name of a file of tensors."""
    return f"rank-{number:05d}.safetensors"


def read_index(path: Path) -> dict[str, Entry]:
    """tensors.json: every tensor with its rectangles, checked.

    Raises:
        CheckpointError: it is not one, is of a newer version, or contradicts itself.
    """
    try:
        content = parse_json(read_file(path, most=MOST_INDEX_BYTES, inside=path.parent))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        if content["version"] != VERSION or content["dtype"] != "F32":
            raise ValueError(f"version {content['version']} with {content['dtype']} is not known")
        entries = {}
        for name, entry in content["tensors"].items():
            shape = _sizes(entry["shape"])
            parts = [(number, _sizes(o), _sizes(s)) for number, o, s in entry["rectangles"]]
            if any(type(number) is not int or number < 0 for number, _, _ in parts):
                raise ValueError(f"{name} is in a file without a number")
            check_filled(name, shape, [(o, s) for _, o, s in parts])
            files = [file_name(number) for number, _, _ in parts]
            entries[name] = Entry(
                shape,
                [Rectangle(o, s, (f, key_of(name, o))) for f, (_, o, s) in zip(files, parts)],
            )
        return entries
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}.") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from None


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
        raise ValueError(f"{values!r} is not a list of sizes")
    return tuple(values)
