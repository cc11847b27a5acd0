"""Which windows of its datasets a run has read, up to a checkpoint: exact, from the order.

    checkpoint.json -> Sampler, Position --samples--> (number, dataset, shard, sequence)

Nothing had to be logged: the order is a function of the seed and the datasets, and the checkpoint
says where it stood. Needs no torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.checkpoint.record import CheckpointRecord
from pipeline.data.datasets import Dataset, open_datasets
from pipeline.data.mixture import Ints, Position, Samples
from pipeline.data.order import num_sequences
from pipeline.data.sampler import Sampler
from pipeline.errors import CheckpointError

AT_ONCE = 1 << 20  # samples whose addresses are computed at a time: 100 MB of arrays
MOST_SAMPLES = 1 << 31
"""Samples of a run. 3e5 a second and core are computed again, so these take two hours; a run of 4
trillion tokens in windows of 2,048 has as many."""


class Seen:
    """The samples of a run up to a checkpoint, since its data were last changed.

    Samples that a rollback has skipped are among them: they came in the order, though no step that
    is left used them.
    """

    def __init__(self, record: CheckpointRecord) -> None:
        """Open the datasets, which must be where they were; their tokens are not read.

        Raises:
            DataError: a dataset is missing, or another than it was.
            CheckpointError: the record says of more samples than any run has read.
        """
        facts = record.loader["order"]
        # Data that are other ones by now tell nothing of what was read, whatever the run allowed.
        data = replace(record.data(), allow_dataset_change=False)
        with tempfile.TemporaryDirectory() as scratch:
            datasets = open_datasets(data.train, cfg=data, cache_dir=Path(scratch))
        self.seq_len: int = facts["seq_len"]
        self.sampler = Sampler(data, datasets, seq_len=self.seq_len, seed=facts["seed"])
        self.position: Position = self.sampler.position(record.loader)
        if self.num_samples > MOST_SAMPLES:  # of a stranger: it would be at it for ever
            raise CheckpointError(
                f"the checkpoint says that {self.num_samples:,} samples were read, in "
                f"{record.step:,} steps; at most {MOST_SAMPLES:,} are computed again. Its record "
                "is damaged."
            )

    @property
    def num_samples(self) -> int:
        """Samples that were read, each of them a window, one read twice counted twice."""
        return self.position.samples_seen

    @property
    def first_sample(self) -> int:
        """Number of the first sample whose place is known."""
        return self.position.segments[0].start

    def places(self, numbers: Ints) -> tuple[Ints, Ints, Ints]:
        """(dataset, shard, sequence) of samples by their numbers, from first_sample on."""
        starts = [segment.start for segment in self.position.segments]
        source, index = np.empty_like(numbers), np.empty_like(numbers)
        # The last segment that begins at or before a sample; of empty ones the last counts.
        owner = np.searchsorted(starts, numbers, "right") - 1
        for i in np.unique(owner).tolist():
            at = np.flatnonzero(owner == i)
            source[at], index[at] = self.position.segments[i].locate(numbers[at])
        return source, *self.sampler.addresses(Samples(numbers, source, index))

    def dataset(self, source: int) -> Dataset:
        """A dataset by its place in the sampler."""
        return self.sampler.datasets[source]

    def firsts(self, source: int) -> Ints:
        """(shards + 1,) number in the dataset of each shard's first window; last, of all."""
        dataset = self.dataset(source)
        counts = num_sequences(dataset.shard_tokens, self.seq_len, packed=dataset.is_packed)
        return np.concatenate([[0], np.cumsum(counts)])

    def windows(self, source: int) -> Iterator[tuple[Ints, Ints]]:
        """(sample numbers, their windows' numbers in a dataset), a piece at a time."""
        first = self.firsts(source)
        for samples in self._pieces():
            mine = np.flatnonzero(samples.source == source)
            shard, sequence = self.sampler.orders[source](samples.index[mine])
            yield samples.number[mine], first[shard] + sequence

    def _pieces(self) -> Iterator[Samples]:
        """All samples, AT_ONCE at a time."""
        segments = self.position.segments
        stops = [*(segment.start for segment in segments[1:]), self.num_samples]
        for segment, stop in zip(segments, stops):
            for begin in range(segment.start, stop, AT_ONCE):
                numbers = np.arange(begin, min(begin + AT_ONCE, stop))
                yield Samples(numbers, *segment.locate(numbers))
