"""Token windows cut into micro-batches, with the masks that the config asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.choices import OnCorrupt
from pipeline.config.data import DataConfig
from pipeline.data.mixture import Ints
from pipeline.data.reader import Windows


@dataclass
class Batch:
    """One micro-batch on one data-parallel rank."""

    tokens: Tensor
    """(micro_batch_size, seq_len) int64."""
    labels: Tensor
    """(micro_batch_size, seq_len) int64: tokens shifted by one."""
    sample_ids: np.ndarray
    """(micro_batch_size,) int64 global sample numbers."""
    loss_mask: Tensor | None = None
    """Same shape, float32; None: all ones. Whether it is None follows from the config: the same on
    all ranks.
    """
    document_ids: Tensor | None = None
    """(micro_batch_size, seq_len) int64, counted from 0 in each sequence; None: attention is not
    masked by document.
    """
    positions: Tensor | None = None
    """(micro_batch_size, seq_len) int64; None: 0..seq_len-1."""
    num_documents: int = 0
    """How many `document_ids` tells apart in all rows, as the host knows; 0: nobody has counted."""
    images: Tensor | None = None
    """(micro_batch_size, slots, 3, image_size, image_size) uint8: a row's pictures in the order of
    their placeholders, then blank ones; the slots are those of the datasets, the same in every
    micro-batch on every rank. None: no dataset has pictures.
    """
    patch_ids: Tensor | None = None
    """(micro_batch_size, seq_len) int64: which patch of its row's pictures a token stands for,
    counted over all of them; -1: it is text. None: as `images`.
    """

    @classmethod
    def of_whole_sequences(
        cls, ids: Tensor, *, loss_mask: Tensor | None, documents: bool, positions: bool
    ) -> Batch:
        """A micro-batch of (B, S) ids, each row one document from its first token.

        Args:
            ids: on the device; the labels are the same ids, shifted, and end with the row's first.
            loss_mask: as the field.
            documents: whether document_ids are made.
            positions: whether positions are made.
        """
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return cls(
            tokens=ids,
            labels=ids.roll(-1, 1),
            loss_mask=loss_mask,
            document_ids=torch.zeros_like(ids) if documents else None,
            positions=places if positions else None,
            sample_ids=np.arange(len(ids)),
            num_documents=len(ids) if documents else 0,
        )

    def beginning(self, *, rows: int, tokens: int) -> Batch:
        """The first tokens of the first rows, with their labels and all pictures of these rows."""
        return self._of_fields(
            lambda field: field[:rows, :tokens].contiguous(),
            lambda images: images[:rows],
            sample_ids=self.sample_ids[:rows],
        )

    def repeated(self, times: int) -> Batch:
        """All rows, and again; num_documents remains that of one copy."""
        return self._of_fields(
            lambda field: field.repeat(times, 1),
            lambda images: images.repeat(times, 1, 1, 1, 1),
            sample_ids=np.tile(self.sample_ids, times),
        )

    def _of_fields(
        self,
        change: Callable[[Tensor], Tensor],
        change_images: Callable[[Tensor], Tensor],
        *,
        sample_ids: np.ndarray,
    ) -> Batch:
        """A batch of changed (B, S) fields and pictures, where there are any."""
        names = ("tokens", "labels", "loss_mask", "document_ids", "positions", "patch_ids")
        fields: dict[str, Any] = {
            name: None if (field := getattr(self, name)) is None else change(field)
            for name in names
        }
        return replace(
            self,
            **fields,
            images=None if self.images is None else change_images(self.images),
            sample_ids=sample_ids,
        )


@dataclass(frozen=True)
class Masks:
    """Which of a Batch's optional fields are made."""

    loss: bool = False
    eod_loss: bool = False
    """No loss where the input is the end-of-document token; needs `loss`."""
    documents: bool = False
    positions: bool = False

    @classmethod
    def of(cls, cfg: DataConfig, *, packed: bool, some_left_out: bool = False) -> Masks:
        """The fields that a config asks for; of packed rows all, whatever it says.

        some_left_out: sequences may be among the others of which no label counts.
        """
        if packed:
            return cls(loss=True, documents=True, positions=True)
        loss = cfg.mask_eod_loss or some_left_out or cfg.on_corrupt is OnCorrupt.skip
        return cls(loss, cfg.mask_eod_loss, cfg.mask_documents, cfg.reset_positions)


def make_batches(
    windows: Windows,
    number: Ints,
    *,
    seq_len: int,
    micro_batch_size: int,
    masks: Masks,
    eod: int,
    device: torch.device,
    placeholder: int | None = None,
) -> list[Batch]:
    """Cut (n, full length + 1) ids into micro-batches of seq_len, a divisor of the full length.

    A sample is cut into full / seq_len sequences that follow each other; the label of a sequence's
    last token is the first token of the next. Tokens `placeholder` stand for patches of pictures.
    """
    # Row-major: a sample's pieces become rows that follow each other. Labels are the same ids one
    # further on, so the last label of a piece is the first token of the next.
    count, full = len(windows.ids), windows.ids.shape[1] - 1
    tokens, labels = (
        part.reshape(-1, seq_len) for part in (windows.ids[:, :-1], windows.ids[:, 1:])
    )
    sample_ids = np.repeat(number, full // seq_len)
    loss_mask = document_ids = positions = None
    if masks.loss:
        loss_mask = _learned_labels(windows).reshape(-1, seq_len)
        if masks.eod_loss:
            loss_mask &= tokens != eod
    if masks.documents:
        assert windows.starts is not None
        # Places of beginnings in the flat (count * full) tokens; cutting leaves them there.
        starts = np.concatenate([places + row * full for row, places in enumerate(windows.starts)])
        document_ids, positions = _documents(starts, count * full // seq_len, seq_len)
        positions = positions if masks.positions else None
    patch_ids = None if windows.images is None else _patch_ids(tokens, placeholder)
    num_documents = _num_documents(document_ids, len(tokens), micro_batch_size)
    fields: dict[str, Any] = {
        "tokens": tokens, "labels": labels, "document_ids": document_ids, "positions": positions,
        "patch_ids": patch_ids,
    }  # fmt: skip
    # The whole step at once: large arrays come back from the allocator without page faults, small
    # ones do not.
    moved: dict[str, Tensor] = {
        name: to_device(field, device) for name, field in fields.items() if field is not None
    }
    if loss_mask is not None:
        moved["loss_mask"] = to_device(loss_mask, device).to(torch.float32)
    if windows.images is not None:
        assert full == seq_len, "pictures belong to whole rows"
        moved["images"] = _pixels_to_device(windows.images, device)
    parts = [slice(at, at + micro_batch_size) for at in range(0, len(tokens), micro_batch_size)]
    return [
        Batch(
            **{name: field[part] for name, field in moved.items()},
            sample_ids=sample_ids[part],
            num_documents=count,
        )
        for part, count in zip(parts, num_documents, strict=True)
    ]


def _patch_ids(tokens: np.ndarray, placeholder: int | None) -> Ints:
    """A row's placeholders stand for the patches of its pictures in turn.

    There are as many of them: the reader has seen to it, before the step.
    """
    stands = tokens == placeholder
    patch_ids: Ints = np.where(stands, stands.cumsum(1) - 1, -1)
    return patch_ids


def _num_documents(document_ids: np.ndarray | None, rows: int, micro_batch_size: int) -> list[int]:
    """Documents in each micro-batch; 0 where they are not told apart."""
    first = range(0, rows, micro_batch_size)
    if document_ids is None:
        return [0] * len(first)
    # All at once: a sum for each of 64 micro-batches was 5 % of a step that reads 2^20 tokens.
    counts: list[int] = np.add.reduceat(document_ids[:, -1] + 1, first).tolist()
    return counts


def _learned_labels(windows: Windows) -> np.ndarray:
    """(n, full) bool: the label at i, which is token i + 1, is there, and to be predicted.

    Of packed rows not where a document begins at i + 1: nobody predicts its first token from its
    neighbour.
    """
    exists: np.ndarray = np.arange(windows.ids.shape[1] - 1) < windows.num_labels[:, None]
    if windows.loss is None:
        return exists
    assert windows.starts is not None
    learned = np.zeros(windows.loss.shape, bool)
    learned[:, :-1] = windows.loss[:, 1:]
    for row, starts in zip(learned, windows.starts, strict=True):
        row[starts[starts > 0] - 1] = False
    return exists & learned


def _documents(starts: Ints, rows: int, seq_len: int) -> tuple[Ints, Ints]:
    """(document_ids, positions), (rows, seq_len) each, from the flat ascending starts of documents.

    Every row begins a new count, whether or not a document begins there. Runs of equal values are
    repeated, not scanned for: several times faster than cumulative sums.
    """
    # Documents as runs of the flat tokens: a run begins where a document or a row does. Its number
    # counts from the first run of its row; both fields are then the runs' values, repeated.
    begins = np.unique(np.concatenate([np.arange(rows) * seq_len, starts]))
    lengths = np.diff(begins, append=rows * seq_len)
    number = np.arange(len(begins)) - np.searchsorted(begins, begins - begins % seq_len)
    positions = np.arange(rows * seq_len) - np.repeat(begins, lengths)
    return np.repeat(number, lengths).reshape(rows, seq_len), positions.reshape(rows, seq_len)


def _pixels_to_device(pixels: np.ndarray, device: torch.device) -> Tensor:
    """The same uint8 on the device; to CUDA as `to_device` does it."""
    tensor = torch.from_numpy(pixels)
    return tensor if device.type != "cuda" else tensor.pin_memory().to(device, non_blocking=True)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """int64 on the device; to CUDA as int32, pinned, on the current stream, without waiting."""
    if device.type != "cuda":
        return torch.from_numpy(array.astype(np.int64))
    return (
        torch.from_numpy(array.astype(np.int32)).pin_memory().to(device, non_blocking=True).long()
    )
