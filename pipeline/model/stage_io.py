"""What travels between pipeline stages, by field.

    batch  --StageSchema.first.pack-->   DeepSpeed  --unpack--> StageInput --> embedding
    hidden --StageSchema.between.pack--> DeepSpeed  --unpack--> StageInput --> block or head

DeepSpeed's pipeline carries a tensor, or a tuple of tensors without names and without gaps. Which
fields it holds follows from the config, in which order is said once, here.

B micro-batch, S a rank's run of the sequences, H hidden; under sequence parallelism hidden is
(S / ranks, B, H).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from pipeline.config.data import DataConfig
from pipeline.config.model import ModelConfig
from pipeline.config.training import ParallelConfig

Packed = Tensor | tuple[Tensor, ...]
SHAPES = {
    "hidden": "(B, S, H) or (S / ranks, B, H)",
    "images": "(B, pictures, 3, size, size)",
}
"""Of the fields that are not (B, S)."""


@dataclass(frozen=True)
class StageInput:
    """What one layer of a pipeline is given; None: not carried to it."""

    tokens: Tensor | None = None
    """(B, S) int64; reaches the embedding only."""
    hidden: Tensor | None = None
    """In the model's layout; reaches every layer but the embedding."""
    document_ids: Tensor | None = None
    """(B, S * context ranks) int64, whole sequences; every block's attention keeps to them."""
    positions: Tensor | None = None
    """(B, S) int64; reaches the embedding only."""
    images: Tensor | None = None
    """(B, pictures, 3, size, size) uint8: DeepSpeed asks every floating tensor for a gradient;
    reaches the embedding only.
    """
    patch_ids: Tensor | None = None
    """(B, S) int64: which patch of the row's pictures a token stands for; -1: it is text. Reaches
    the embedding only.
    """


@dataclass(frozen=True)
class Packing:
    """One border of the pipeline: which fields cross it, in the order of DeepSpeed's tuple."""

    names: tuple[str, ...]
    sequence_ranks: int = 1
    """Tensor-parallel ranks that share hidden's sequence; 1: none do."""
    context_ranks: int = 1
    """Ranks that share each sequence, all but its document ids; 1: none do."""

    def pack(self, given: StageInput) -> Packed:
        """The fields as DeepSpeed takes them: a lone tensor as it is.

        Raises:
            ValueError: a field is missing, would be dropped, or does not fit the others; named.
        """
        found = {f.name: getattr(given, f.name) for f in fields(given)}
        missing = [name for name in self.names if found[name] is None]
        dropped = [n for n, value in found.items() if n not in self.names and value is not None]
        if missing or dropped:
            trouble = " and ".join(
                [f"{name} is missing" for name in missing]
                + [f"{name} would be dropped" for name in dropped]
            )
            raise ValueError(
                f"{trouble}: by the config a stage is given {', '.join(self.names)}. "
                "data.mask_documents brings document_ids, data.reset_positions brings positions, "
                "model.vision brings images and patch_ids."
            )
        tensors = tuple(found[name] for name in self.names)
        self._check_shapes(tensors)
        return tensors[0] if len(tensors) == 1 else tensors

    def unpack(self, packed: Packed) -> StageInput:
        """The inverse of `pack`.

        Raises:
            ValueError: another number of tensors, or a field that does not fit the others; named.
        """
        tensors = (packed,) if isinstance(packed, Tensor) else packed
        if len(tensors) != len(self.names):
            raise ValueError(
                f"a stage is given {', '.join(self.names)}, not {len(tensors)} tensors"
            )
        self._check_shapes(tensors)
        return StageInput(**dict(zip(self.names, tensors)))

    def _check_shapes(self, tensors: tuple[Tensor, ...]) -> None:
        """Every field must have the (B, S) of the first: a swap of two would otherwise train."""
        first = self.names[0]
        expected: tuple[int, int] | None = None
        for name, tensor in zip(self.names, tensors):
            is_hidden = name == "hidden"
            wanted = SHAPES.get(name, "(B, S)")
            if tensor.dim() != len(wanted.partition(" or ")[0].split(",")):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {wanted}")
            batch, size = tensor.shape[0], tensor.shape[1]
            if name == "images":  # has rows only in common with the others
                assert expected is not None
                size = expected[1]
            if is_hidden and self.sequence_ranks > 1:
                batch, size = tensor.shape[1], tensor.shape[0] * self.sequence_ranks
            if name == "document_ids" and not size % self.context_ranks:
                size //= self.context_ranks
            if expected is None:
                expected = (batch, size)
            elif (batch, size) != expected:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}: {first} has {expected[0]} sequences "
                    f"of {expected[1]} tokens"
                )


@dataclass(frozen=True)
class StageSchema:
    """The fields of a run's pipeline."""

    documents: bool = False
    """Whether attention stays inside documents."""
    positions: bool = False
    """Whether positions are given, not counted."""
    sequence_ranks: int = 1
    """As in Packing."""
    context_ranks: int = 1
    """As in Packing."""
    pictures: bool = False
    """Whether rows have pictures."""

    @classmethod
    def of(cls, data: DataConfig, parallel: ParallelConfig, model: ModelConfig) -> StageSchema:
        """The fields a config asks for."""
        return cls(
            documents=data.mask_documents,
            positions=data.reset_positions,
            sequence_ranks=parallel.tensor_parallel_size if parallel.sequence_parallel else 1,
            context_ranks=parallel.context_parallel_size,
            pictures=model.vision.num_layers > 0,
        )

    @property
    def first(self) -> Packing:
        """From the batch into the first stage."""
        optional = {
            "document_ids": self.documents,
            "positions": self.positions,
            "images": self.pictures,
            "patch_ids": self.pictures,
        }
        names = ("tokens", *(name for name, is_on in optional.items() if is_on))
        return Packing(names, context_ranks=self.context_ranks)

    @property
    def between(self) -> Packing:
        """From layer to layer, within a stage and between stages."""
        names = ("hidden", *(["document_ids"] if self.documents else []))
        return Packing(names, self.sequence_ranks, self.context_ranks)
