"""Batches of token ids for one rank: the sampler's order, read ahead by a background thread.

    Position --Sampler.advance, share--> my samples --Reader.gather--> (n, seq_len + 1) ids
             --to device, cut--> num_micro_batches x Batch

All of it runs `prefetch_steps` ahead of the training. Every number of a Batch is a function of
(seed, datasets, weights, seq_len, global batch) and of which samples this rank reads; the state is
the Position after the step that was handed out last, never after what was read ahead.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.choices import OnCorrupt
from pipeline.config.data import DataConfig
from pipeline.config.run_shape import RunShape
from pipeline.config.step_shape import StepShape
from pipeline.data import pii_report
from pipeline.data.batch import Batch, Masks, make_batches
from pipeline.data.dataset_files import read_bytes
from pipeline.data.datasets import open_datasets
from pipeline.data.mixture import Ints, Position, Samples
from pipeline.data.reader import Reader, Windows
from pipeline.data.sampler import Sampler


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
        shape: RunShape,
        seed: int,
        data_rank: int,
        device: torch.device,
        cache_dir: Path,
        reads_tokens: bool = True,
        once_a_step: bool = False,
    ) -> None:
        """Open the datasets; reading starts with the first next_step().

        Args:
            cfg: the datasets and how they are read.
            shape: the run's shape.
            seed: of the order.
            data_rank: of this rank; its peers in other parallel dimensions get the same samples.
            device: where the tensors go.
            cache_dir: for remote shards.
            reads_tokens: false on ranks that only pass activations on (middle pipeline stages):
                they get batches of zeros in the right shape and read no shard. Loss masks and
                documents are real everywhere.
            once_a_step: a sequence that a step reads twice, at the end of an epoch, counts once: no
                label of it counts the second time. A private run promises that of each.

        Raises:
            ConfigError, DataError: settings and datasets do not fit together.
        """
        self.cfg, self.shape, self.data_rank, self.device = (
            cfg,
            shape,
            data_rank,
            torch.device(device),
        )
        self.datasets = open_datasets(cfg.train, cfg=cfg, cache_dir=cache_dir)
        self.sampler = Sampler(cfg, self.datasets, seq_len=shape.seq_len, seed=seed)
        skips = cfg.on_corrupt is OnCorrupt.skip
        self.reader = Reader(self.sampler.datasets, seq_len=shape.seq_len, skip_corrupt=skips)
        self.masks = Masks.of(cfg, packed=self.reader.is_packed, some_left_out=once_a_step)
        self.reads_tokens = reads_tokens or self.masks.loss or self.masks.documents
        self.once_a_step = once_a_step
        self.wait_ms = 0.0
        self.corrupt_samples = 0
        self._position = self.sampler.start()
        self._samples: Samples | None = None
        self._thread: _Ahead | None = None

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json all datasets share."""
        return self.datasets[0].tokenizer_path

    def special_ids(self) -> dict[str, int | None]:
        """`eod` ends a document, `end_of_turn` an answer, `image_token_id` stands for a patch.

        There are no answers where the data are no dialogues, and no patches without pictures.
        """
        chat = self.datasets[0].manifest.chat
        return {
            "eod": self.reader.eod,
            "end_of_turn": chat.end_of_turn if chat else None,
            "image_token_id": self.reader.placeholder,
        }

    def attachments(self) -> dict[str, bytes]:
        """Name to content of what a checkpoint needs to be used: tokenizer, chat template."""
        files = {"tokenizer.json": read_bytes(str(self.tokenizer_path))}
        reports = [
            d.folder.local.parent / pii_report.NAME for d in self.datasets if not d.is_remote
        ]
        if found := [path for path in reports if path.is_file()]:
            without = len(self.datasets) - len(found)
            files[pii_report.NAME] = pii_report.merged(found, without=without)
        if (chat := self.datasets[0].manifest.chat) is not None:
            files["chat_template.jinja"] = chat.template.encode()
        return files

    @property
    def sample_hash(self) -> str:
        """Hash of the last step's global samples, equal at every layout.

        Costs milliseconds: ask on logged steps.
        """
        assert self._samples is not None, "no step was read yet"
        return self.sampler.hash(self._samples)

    def next_step(self) -> list[Batch]:
        """This rank's num_micro_batches of the next step; waits for data if none is ready.

        Raises:
            DataError, ShardError: what the background thread met; the position stays before this
                step.
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
        """Make the training stream wait for the copy, and its tensors outlive that stream's use."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(ready)
        for batch in step.batches:
            for field in (
                batch.tokens,
                batch.labels,
                batch.loss_mask,
                batch.document_ids,
                batch.positions,
                batch.images,
                batch.patch_ids,
            ):
                if field is not None:
                    field.record_stream(stream)

    def state(self) -> dict[str, Any]:
        """JSON for the checkpoint: place after the last next_step(), ledger, blends, datasets."""
        return self.sampler.state(self._position)

    def most_reads(self) -> int:
        """How often a sequence can have been read so far, at most."""
        return self.sampler.most_reads(self._position)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at a state of any layout; O(1).

        Raises:
            DataError: other datasets or order settings than the checkpoint's, unless
                data.allow_dataset_change.
        """
        self.close()
        self._position = self.sampler.position(state)

    def skip_samples(self, num_samples: int) -> None:
        """Leave out the next num_samples global samples; the step number stays."""
        self.close()
        self._position = self.sampler.skip(self._position, num_samples)

    def close(self) -> None:
        """Stop the background thread; the next next_step() starts another at the current place."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    def prepare(self, position: Position) -> _Step:
        """Read this rank's share of the step at `position`; called on the background thread."""
        shape = self.shape.at(position.step)
        samples, after = self.sampler.advance(position, shape.num_samples)
        mine = self.sampler.share(
            samples, data_rank=self.data_rank, data_parallel_size=self.shape.sizes.data
        )
        if self.reads_tokens:
            self.sampler.prefetch(mine)
            windows = self.reader.gather(
                mine.source, *self.sampler.addresses(mine), documents=self.masks.documents
            )
        else:
            windows = self.reader.blank(len(mine.number), documents=self.masks.documents)
        if self.once_a_step:  # of the whole step: the first time may be another rank's
            again = _repeated(samples, self.sampler)[mine.number - samples.number[0]]
            windows.num_labels[again] = 0
        batches, ready = self._batches(windows, mine.number, shape)
        return _Step(batches, samples, after, windows.num_corrupt, ready)

    def _batches(
        self, windows: Windows, number: Ints, shape: StepShape
    ) -> tuple[list[Batch], torch.cuda.Event | None]:
        """This rank's micro-batches, and on CUDA the event after which their copies are there."""

        def make() -> list[Batch]:
            return make_batches(
                windows,
                number,
                seq_len=shape.seq_len,
                micro_batch_size=self.shape.micro_batch_size,
                masks=self.masks,
                eod=self.reader.eod,
                device=self.device,
                placeholder=self.reader.placeholder,
            )

        if self.device.type != "cuda":
            return make(), None
        # A stream of its own, so that the copies overlap with the compute of the steps before.
        with torch.cuda.stream(self._copy_stream):
            return make(), self._copy_stream.record_event()


def _repeated(samples: Samples, sampler: Sampler) -> np.ndarray:
    """(n,) bool: an earlier one of a step's samples, which ascend, is the same sequence.

    So it is where an epoch ends among them: the next one may begin with what the last one read.
    """
    places = np.stack([samples.source, *sampler.addresses(samples)])
    again = np.ones(len(samples.number), bool)
    again[np.unique(places, axis=1, return_index=True)[1]] = False  # the first of each
    return again


class _Ahead:
    """A thread that prepares steps in order and keeps up to `depth` of them ready."""

    def __init__(self, loader: Loader, position: Position, *, depth: int) -> None:
        self.ready: queue.Queue[_Step | BaseException] = queue.Queue(maxsize=depth)
        self.stopping = threading.Event()
        self.thread = threading.Thread(
            target=self._run, args=(loader, position), name="loader", daemon=True
        )
        self.thread.start()

    def _run(self, loader: Loader, position: Position) -> None:
        """The thread: steps in order, until it is closed or one fails."""
        try:
            if loader.device.type == "cuda":
                # A new thread stands at device 0, and torch.cuda.stream() returns there: every rank
                # of a node would open a context on GPU 0, some 0.5 GiB each.
                torch.cuda.set_device(loader.device)
            # put() waits while `depth` steps lie ready, so depth + 1 are held at most.
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
