"""Checkpoints of a part of a model: what was trained, and of which base it is a part.

    base folder --identity--> Base(path, sha256) in checkpoint.json, checked wherever it is opened
    adapter checkpoint, base --MergedTensors--> every tensor of the whole model, one at a time

Merging is done in fp32: W + alpha / rank * B A.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.checkpoint.folder import SUMS, find, sums_text
from pipeline.checkpoint.record import CheckpointRecord
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.parameter_names import parameter_shapes
from pipeline.errors import CheckpointError
from pipeline.files import sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.checkpoint.agreement import Agreement
    from pipeline.checkpoint.tensors import CheckpointTensors
    from pipeline.model.fragments import Chunk

Read = Callable[[str, tuple[int, ...]], "Tensor"]


@dataclass(frozen=True)
class Base:
    """The weights that an adapter belongs to."""

    path: str
    """A checkpoint, or a Hugging Face folder; where it was when the run started."""
    sha256: str
    """Of a checkpoint its SHA256SUMS, of a Hugging Face folder the same list of its files."""

    def check(self, found: Base) -> None:
        """Raise CheckpointError unless `found` has the same content."""
        if found.sha256 != self.sha256:
            raise CheckpointError(
                f"{found.path} is not the base of this adapter: its content has the sha256 "
                f"{found.sha256[:16]}..., the adapter was trained beside {self.sha256[:16]}..., "
                f"which was {self.path}. Give that folder."
            )


def base_of(folder: Path, ranks: Agreement | None = None) -> Base:
    """What a folder of weights is as a base; ranks share the reading. Collective where given.

    Raises:
        CheckpointError: a file cannot be read.
    """
    path = str(folder.absolute())
    if (folder / SUMS).is_file():
        return Base(path, sha256_of(folder / SUMS))
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])

    def sums() -> dict[str, str]:
        own = files[ranks.rank :: ranks.world_size] if ranks else files
        try:
            return {file.name: sha256_of(file) for file in own}
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read: {error}.") from None

    parts = ranks.gather(ranks.agree(sums)) if ranks else [sums()]
    whole = {name: digest for part in parts for name, digest in part.items()}
    return Base(path, hashlib.sha256(sums_text(whole).encode()).hexdigest())


def recorded_base(record: CheckpointRecord) -> Base | None:
    """The base of an adapter checkpoint; None: it holds a whole model."""
    base = record.base
    return None if base is None else Base(base["path"], base["sha256"])


def find_base(wanted: Base, base: Path | None = None) -> Path:
    """The folder of an adapter's base.

    Raises:
        CheckpointError: it is not where it was.
    """
    folder = Path(wanted.path) if base is None else base
    try:
        return folder if (folder / "config.json").is_file() else find(folder)
    except (CheckpointError, OSError):  # a name may be longer than names can be
        raise CheckpointError(
            f"the base of this adapter is not in {folder} (sha256 {wanted.sha256[:16]}...). "
            "Tell export, or `python -m pipeline.checkpoint merge ADAPTER OUTPUT`, where it is now "
            "with base=...; other commands take the merged OUTPUT."
        ) from None


def delta(a: Tensor, b: Tensor, *, alpha: float) -> Tensor:
    """What A (rank, in) and B (out, rank) add to W: alpha / rank * B A, (out, in) fp32."""
    return (b.float() @ a.float()) * (alpha / a.shape[0])


class WholeTensors(Protocol):
    """The weights of a whole model, one after the other; entries as in CheckpointTensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole shape of an entry."""

    def tensor(self, name: str) -> Tensor:
        """A whole entry, fp32 on the host."""


class ModelTensors(WholeTensors, Protocol):
    """The same, in whatever files, at any layout."""

    folder: Path

    @property
    def parameters(self) -> list[str]:
        """Canonical names."""

    def read_into(self, chunks: Iterable[Chunk]) -> None:
        """Fill each chunk's data, on whatever device it is."""


class MergedTensors:
    """An adapter checkpoint and its base as the weights of one whole model."""

    def __init__(self, adapter: CheckpointTensors, record: CheckpointRecord, base: Read) -> None:
        """Combine them; `base` reads what the adapter has not, by canonical name and shape."""
        self.folder, self._adapter, self._base = adapter.folder, adapter, base
        self._own = set(adapter.parameters)
        self._alpha = record.finetune().lora_alpha
        model = record.model()
        assert model.vocab_size is not None
        self._shapes = parameter_shapes(model, FinetuneConfig(), vocab_size=model.vocab_size)

    @property
    def parameters(self) -> list[str]:
        """Canonical names; the low-rank matrices are in the weights."""
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole shape of an entry."""
        return self._shapes[name.removeprefix("weights/")]

    def tensor(self, name: str) -> Tensor:
        """A whole weight with what was trained in it, fp32 on the host."""
        parameter = name.removeprefix("weights/")
        if parameter in self._own:
            whole = self._adapter.tensor(name)
        else:
            whole = self._base(parameter, self._shapes[parameter])
        stem, _, kind = name.rpartition(".")
        if kind == "weight" and f"{stem}.lora_a".removeprefix("weights/") in self._own:
            pair = (self._adapter.tensor(f"{stem}.lora_{n}") for n in "ab")
            whole = whole + delta(*pair, alpha=self._alpha)
        return whole

    def read_into(self, chunks: Iterable[Chunk]) -> None:
        """Fill each chunk's data, holding one whole parameter at a time."""
        name, whole = "", None
        for chunk in chunks:
            if chunk.name != name or whole is None:
                name, whole = chunk.name, self.tensor(chunk.name)
            sizes = zip(chunk.offsets, chunk.data.shape, strict=True)
            chunk.data.copy_(whole[tuple(slice(o, o + n) for o, n in sizes)])


def as_json(base: Base | None) -> dict[str, str] | None:
    """What checkpoint.json says of a base."""
    return None if base is None else dataclasses.asdict(base)
