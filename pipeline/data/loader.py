"""Batches of token ids for one rank: the sampler's order, read ahead by a background thread.

    Position --Sampler.advance, share--> my samples --Reader.gather--> (n, seq_len + 1) ids
             --to device, cut--> num_micro_batches x Batch       all of it `prefetch_steps` ahead of the training

Every number of a Batch is a function of (seed, datasets, weights, seq_len, global batch) and of which samples this rank
reads; the state is the Position after the step that was handed out last, never after what was read ahead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DataConfig, OnCorrupt
from pipeline.data.facts import Dataset, open_datasets
from pipeline.data.mixture import Ints, Position, Samples
from pipeline.data.reader import Reader, Windows
from pipeline.data.sampler import Sampler
from pipeline.errors import DataError
from pipeline.run_shape import RunShape, StepShape


@dataclass
class Batch:
    """One micro-batch on one data-parallel rank."""

    tokens: Tensor
    """(micro_batch_size, seq_len) int64."""
    labels: Tensor
    """(micro_batch_size, seq_len) int64: tokens shifted by one."""
    loss_mask: Tensor | None
    """Same shape, float32; None: all ones. Whether it is None follows from the config: the same on all ranks."""
    document_ids: Tensor | None
    """(micro_batch_size, seq_len) int64, counted from 0 in each sequence; None: attention is not masked by document."""
    positions: Tensor | None
    """(micro_batch_size, seq_len) int64; None: 0..seq_len-1."""
    sample_ids: np.ndarray
    """(micro_batch_size,) int64 global sample numbers."""


@dataclass(frozen=True)
class Masks:
    """Which of a Batch's optional fields are made."""

    loss: bool = False
    eod_loss: bool = False
    """No loss where the input is the end-of-document token; needs `loss`."""
    documents: bool = False
    positions: bool = False

    @classmethod
    def of(cls, cfg: DataConfig) -> Masks:
        """The fields a config asks for."""
        loss = cfg.mask_eod_loss or cfg.on_corrupt is OnCorrupt.skip
        return cls(loss, cfg.mask_eod_loss, cfg.mask_documents, cfg.reset_positions)


@dataclass
class _Step:
    """What the background thread hands over."""

    batches: list[Batch]
    samples: Samples  # of the whole step, all ranks
    after: Position
    corrupt: int
    ready: torch.cuda.Event | None  # None on the CPU


class Loader:
    """The training data of one data-parallel rank, step by step."""

    def __init__(
        self,
        cfg: DataConfig,
        *,
        run: RunShape,
        seed: int,
        data_rank: int,
        device: torch.device,
        cache_dir: Path,
        reads_tokens: bool = True,
    ) -> None:
        """Open the datasets; reading starts with the first next_step().

        Args:
            cfg: the datasets and how they are read.
            run: the run's shape.
            seed: of the order.
            data_rank: of this rank; its peers in other parallel dimensions get the same samples.
            device: where the tensors go.
            cache_dir: for remote shards.
            reads_tokens: false on ranks that only pass activations on (middle pipeline stages): they get batches of
                zeros in the right shape and read no shard. Loss masks are real everywhere.

        Raises:
            ConfigError, DataError: settings and datasets do not fit together.
        """
        self.cfg, self.run, self.data_rank, self.device = cfg, run, data_rank, torch.device(device)
        self.datasets = open_datasets(cfg.train, cfg=cfg, cache_dir=cache_dir)
        self.sampler = Sampler(cfg, self.datasets, seq_len=run.seq_len, seed=seed)
        self.reader = Reader(self.sampler.datasets, seq_len=run.seq_len, skip_corrupt=cfg.on_corrupt is OnCorrupt.skip)
        self.masks = Masks.of(cfg)
        self.reads_tokens = reads_tokens or self.masks.loss
        self.wait_ms = 0.0
        self.corrupt_samples = 0
        self._position = self.sampler.start()
        self._samples: Samples | None = None
        self._thread: _Ahead | None = None

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json all datasets share."""
        return self.datasets[0].tokenizer_path

    @property
    def sample_hash(self) -> str:
        """Hash of the last step's global samples; equal for every layout. Costs milliseconds: ask on logged steps."""
        assert self._samples is not None, "no step was read yet"
        return self.sampler.hash(self._samples)

    def next_step(self) -> list[Batch]:
        """The num_micro_batches of the next step, this rank's share; waits for data if none is ready.

        Raises:
            DataError, ShardError: what the background thread met; the position stays before this step.
        """
        began = time.perf_counter()
        if self._thread is None and self.cfg.prefetch_steps > 0:
            self._thread = _Ahead(self, self._position, depth=self.cfg.prefetch_steps)
        try:
            step = self._thread.next() if self._thread else self.prepare(self._position)
        except BaseException:
            self.close()
            raise
        if step.ready is not None:
            self._take_over(step, step.ready)
        self._position, self._samples = step.after, step.samples
        self.corrupt_samples += step.corrupt
        self.wait_ms = (time.perf_counter() - began) * 1e3
        return step.batches

    @functools.cached_property
    def _copy_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def _take_over(self, step: _Step, ready: torch.cuda.Event) -> None:
        """Make the training stream wait for the copy, and its tensors live until that stream is done with them."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(ready)
        for batch in step.batches:
            for field in (batch.tokens, batch.labels, batch.loss_mask, batch.document_ids, batch.positions):
                if field is not None:
                    field.record_stream(stream)

    def state(self) -> dict[str, Any]:
        """JSON for the checkpoint: the place after the last next_step(), ledger, blends, dataset identities."""
        return self.sampler.state(self._position)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at a state of any layout; O(1).

        Raises:
            DataError: other datasets or order settings than the checkpoint's, unless data.allow_dataset_change.
        """
        self.close()
        self._position = self.sampler.position(state)

    def skip_samples(self, num_samples: int) -> None:
        """Leave out the next num_samples global samples; the step number stays."""
        self.close()
        self._position = self.sampler.skip(self._position, num_samples)

    def close(self) -> None:
        """Stop the background thread; the next next_step() starts another at the current position."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    def prepare(self, position: Position) -> _Step:
        """Read this rank's share of the step at `position`; called on the background thread."""
        shape = self.run.at(position.step)
        samples, after = self.sampler.advance(position, shape.num_samples)
        mine = self.sampler.share(samples, data_rank=self.data_rank, data_parallel_size=self.run.data_parallel_size)
        if self.reads_tokens:
            self.sampler.prefetch(mine)
            windows = self.reader.gather(mine.source, *self.sampler.addresses(mine), documents=self.masks.documents)
        else:
            windows = self.reader.blank(len(mine.number), documents=self.masks.documents)
        batches, ready = self._batches(windows, mine.number, shape)
        return _Step(batches, samples, after, windows.num_corrupt, ready)

    def _batches(self, windows: Windows, number: Ints, shape: StepShape) -> tuple[list[Batch], torch.cuda.Event | None]:
        def make() -> list[Batch]:
            return make_batches(
                windows, number, seq_len=shape.seq_len, micro_batch_size=self.run.micro_batch_size,
                masks=self.masks, eod=self.reader.eod, device=self.device,
            )  # fmt: skip

        if self.device.type != "cuda":
            return make(), None
        # A stream of its own, so that the copies overlap with the compute of the steps before.
        with torch.cuda.stream(self._copy_stream):
            return make(), self._copy_stream.record_event()


class _Ahead:
    """A thread that prepares steps in order and keeps up to `depth` of them ready."""

    def __init__(self, loader: Loader, position: Position, *, depth: int) -> None:
        self.ready: queue.Queue[_Step | BaseException] = queue.Queue(maxsize=depth)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(loader, position), name="loader", daemon=True)
        self.thread.start()

    def _run(self, loader: Loader, position: Position) -> None:
        try:
            while not self.stopping.is_set():
                step = loader.prepare(position)
                position = step.after
                self.ready.put(step)
        except BaseException as error:  # whatever it is, the training loop must hear of it
            self.ready.put(error)

    def next(self) -> _Step:
        step = self.ready.get()
        if isinstance(step, BaseException):
            raise step
        return step

    def close(self) -> None:
        self.stopping.set()
        while self.thread.is_alive():  # it may be waiting for room
            with contextlib.suppress(queue.Empty):
                self.ready.get(timeout=0.05)
        self.thread.join()


def make_batches(
    windows: Windows, number: Ints, *, seq_len: int, micro_batch_size: int, masks: Masks, eod: int, device: torch.device
) -> list[Batch]:
    """Cut (n, full length + 1) ids into micro-batches of sequences of seq_len, which divides the full length.

    A sample is cut into full / seq_len sequences that follow each other; the label of a sequence's last token is the
    first token of the next.
    """
    count, full = len(windows.ids), windows.ids.shape[1] - 1
    tokens, labels = (part.reshape(-1, seq_len) for part in (windows.ids[:, :-1], windows.ids[:, 1:]))
    sample_ids = np.repeat(number, full // seq_len)
    loss_mask = document_ids = positions = None
    if masks.loss:
        loss_mask = (np.arange(full) < windows.num_labels[:, None]).reshape(-1, seq_len)
        if masks.eod_loss:
            loss_mask &= tokens != eod
    if masks.documents:
        assert windows.starts is not None
        starts = np.concatenate([places + row * full for row, places in enumerate(windows.starts)])
        document_ids, positions = _documents(starts, count * full // seq_len, seq_len)
        positions = positions if masks.positions else None

    # The whole step at once: large arrays come back from the allocator without page faults, small ones do not.
    moved = [
        None if field is None else _to_device(field, device) for field in (tokens, labels, document_ids, positions)
    ]
    mask = None if loss_mask is None else _to_device(loss_mask, device).to(torch.float32)

    def rows(field: Tensor | None, at: int) -> Any:
        return None if field is None else field[at : at + micro_batch_size]

    return [
        Batch(
            tokens=rows(moved[0], at),
            labels=rows(moved[1], at),
            loss_mask=rows(mask, at),
            document_ids=rows(moved[2], at),
            positions=rows(moved[3], at),
            sample_ids=sample_ids[at : at + micro_batch_size],
        )
        for at in range(0, len(tokens), micro_batch_size)
    ]


def _documents(starts: Ints, rows: int, seq_len: int) -> tuple[Ints, Ints]:
    """(document_ids, positions), (rows, seq_len) each, from the flat places where documents begin, ascending.

    Every row begins a new count, whether or not a document begins there. Runs of equal values are repeated, not
    scanned for: several times faster than cumulative sums.
    """
    begins = np.unique(np.concatenate([np.arange(rows) * seq_len, starts]))
    lengths = np.diff(begins, append=rows * seq_len)
    number = np.arange(len(begins)) - np.searchsorted(begins, begins - begins % seq_len)
    positions = np.arange(rows * seq_len) - np.repeat(begins, lengths)
    return np.repeat(number, lengths).reshape(rows, seq_len), positions.reshape(rows, seq_len)


def validation_batches(
    dataset: Dataset,
    *,
    seq_len: int,
    micro_batch_size: int,
    data_rank: int,
    data_parallel_size: int,
    num_sequences: int,
    device: torch.device,
    masks: Masks = Masks(),
) -> Iterator[Batch]:
    """The first num_sequences windows of a dataset in their order on disk (0: all), the same for every layout.

    Every rank yields the same number of batches; sequences that only fill the last ones have loss_mask 0, and so has
    what a shard's last window lacks: every token but each shard's first is a label once.

    Args:
        dataset: of facts.open_datasets(cfg.validation, ...).
        seq_len: tokens of a window.
        micro_batch_size: sequences of a Batch.
        data_rank: of this rank.
        data_parallel_size: ranks that share the windows.
        num_sequences: windows in all; 0: every one.
        device: where the tensors go.
        masks: Masks.of(cfg) to evaluate under the attention the model is trained with.
    """
    reader = Reader([dataset], seq_len=seq_len)
    masks = dataclasses.replace(masks, loss=True)
    per_shard = -(-np.maximum(dataset.shard_tokens - 1, 0) // seq_len)
    first = np.concatenate([[0], np.cumsum(per_shard)])
    total = int(first[-1]) if num_sequences == 0 else min(num_sequences, int(first[-1]))
    if not total:
        raise DataError(f"dataset {dataset.name} ({dataset.path}) has nothing to predict: no shard has two tokens.")
    stride = micro_batch_size * data_parallel_size
    for start in range(0, total, stride):
        number = start + data_rank * micro_batch_size + np.arange(micro_batch_size)
        inside = np.minimum(number, total - 1)
        shard = np.searchsorted(first, inside, "right") - 1
        windows = reader.gather(np.zeros_like(shard), shard, inside - first[shard], documents=masks.documents)
        windows.num_labels[number >= total] = 0
        yield from make_batches(
            windows, number, seq_len=seq_len, micro_batch_size=micro_batch_size,
            masks=masks, eod=reader.eod, device=device,
        )  # fmt: skip


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """int64 on the device; to CUDA through pinned memory on the current stream, without waiting, as int32."""
    if device.type != "cuda":
        return torch.from_numpy(array.astype(np.int64))
    return torch.from_numpy(array.astype(np.int32)).pin_memory().to(device, non_blocking=True).long()
