"""From config and datasets to the samples of any step, and the state for a checkpoint.

    Position --advance--> Samples of the step --share--> this rank's
             --addresses--> (dataset, shard, sequence)

No file is read and no torch is needed here: the audit proves the order of a run on a laptop.
Datasets are kept in the order of their identities, so the order they are listed in the config
changes nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.config.run_shape import RunShape
from pipeline.data.datasets import Dataset
from pipeline.data.mixture import PERIOD, Ints, Mixture, Position, Samples, Segment, cut
from pipeline.data.order import Order, num_sequences
from pipeline.errors import ConfigError, DataError
from pipeline.redaction import redact


class Sampler:
    """The order of a whole run over all of its datasets."""

    def __init__(
        self, cfg: DataConfig, datasets: Sequence[Dataset], *, seq_len: int, seed: int
    ) -> None:
        self.datasets = sorted(datasets, key=lambda dataset: dataset.identity)
        self.identities = [dataset.identity for dataset in self.datasets]
        self.allow_change = cfg.allow_dataset_change
        self.facts = {"seed": seed, "seq_len": seq_len, "lanes": cfg.lanes, "window": cfg.window}
        self.orders = [
            _order(dataset, i, cfg, seq_len=seq_len, seed=seed)
            for i, dataset in enumerate(self.datasets)
        ]
        self.mixture = Mixture(
            names=tuple(dataset.name for dataset in self.datasets),
            stages=_stages(cfg, self.datasets),
            limits=tuple(
                None if d.max_epochs is None else int(d.max_epochs * order.epoch_size)
                for d, order in zip(self.datasets, self.orders)
            ),
        )
        self._former: dict[
            str, int
        ] = {}  # ledger of datasets that were dropped; they continue when they come back

    def start(self) -> Position:
        """The position before the first step."""
        return self.mixture.begin()

    def advance(self, position: Position, num_samples: int) -> tuple[Samples, Position]:
        """The samples of the step at `position` and the position after it."""
        return self.mixture.advance(position, num_samples)

    def skip(self, position: Position, num_samples: int) -> Position:
        """The position num_samples further on, without a step; O(1)."""
        return self.mixture.skip(position, num_samples)

    def seek(self, step: int, shape: RunShape, begin: Position | None = None) -> Position:
        """The position before a step of a run unbroken since `begin` (None: its start).

        O(1) a stage of ramp and blends.
        """
        position = self.start() if begin is None else begin
        # Between these steps every step has as many samples and the blend does not change, so a
        # stretch is one skip; a blend takes force at `skip`, which reads the step of the position.
        edges = {
            step,
            *(until for until, _ in shape.ramp),
            *(first for first, _ in self.mixture.stages),
        }
        for edge in sorted(edge for edge in edges if position.step < edge <= step):
            num_samples = (edge - position.step) * shape.at(position.step).num_samples
            position = replace(self.skip(position, num_samples), step=edge)
        return position

    def share(self, samples: Samples, *, data_rank: int, data_parallel_size: int) -> Samples:
        """What one data-parallel rank reads of a step."""
        lane = np.zeros_like(samples.number)
        for index, at in _by_source(samples):
            lane[at] = self.orders[index].lane(samples.index[at])
        return cut(samples, lane, data_rank=data_rank, data_parallel_size=data_parallel_size)

    def addresses(self, samples: Samples) -> tuple[Ints, Ints]:
        """(shard, sequence) of each sample in its dataset."""
        shard, sequence = np.empty_like(samples.index), np.empty_like(samples.index)
        for index, at in _by_source(samples):
            shard[at], sequence[at] = self.orders[index](samples.index[at])
        return shard, sequence

    def most_reads(self, position: Position) -> int:
        """How often any one sequence can have been read: whole epochs of a dataset, begun ones too.

        An epoch reads each sequence once, so that a dataset of which n samples were read has read
        none more than ceil(n / sequences) times.
        """
        return max(
            -(-int(count) // order.epoch_size) for count, order in zip(position.ledger, self.orders)
        )

    def prefetch(self, samples: Samples) -> None:
        """Begin to fetch the remote shards that these samples and their successors lie in."""
        for index, at in _by_source(samples):
            if self.datasets[index].is_remote:
                self.datasets[index].prefetch(self.orders[index].upcoming_shards(samples.index[at]))

    def hash(self, samples: Samples) -> str:
        """16 hex digits for exactly these sequences in this order; equal at every layout."""
        return hash_addresses(self.identities, samples, *self.addresses(samples))

    # ---- checkpoints -----------------------------------------------------------------------------

    def state(self, position: Position) -> dict[str, Any]:
        """`position` as JSON: counts by dataset identity."""
        ledger = {**self._former, **dict(zip(self.identities, position.ledger))}
        return {
            "step": position.step,
            "samples_seen": position.samples_seen,
            "order": self.facts,
            "ledger": ledger,
            "segments": [
                {
                    "start": segment.start,
                    "weights": dict(zip(self.identities, segment.weights)),
                    "slots": dict(zip(self.identities, segment.slots)),
                    "consumed": dict(zip(self.identities, segment.consumed)),
                }
                for segment in position.segments
            ],
            "datasets": {
                d.identity: {
                    "name": d.name,
                    "path": redact(d.path),
                    "tokens": int(d.manifest.tokens),
                }
                for d in self.datasets
            },
        }

    def changes(self, state: dict[str, Any]) -> list[str]:
        """What is otherwise than in a checkpoint's state, a sentence each."""
        return [
            *_differences(state["order"], self.facts),
            *self._dataset_changes(state["datasets"]),
        ]

    def position(self, state: dict[str, Any]) -> Position:
        """The position a checkpoint's state stands for; O(1).

        Raises:
            DataError: other datasets, seed, seq_len, lanes or window than those of the checkpoint,
                and data.allow_dataset_change is false.
        """
        _check_state(state)
        same_order = self._accept(_differences(state["order"], self.facts))
        same_datasets = self._accept(self._dataset_changes(state["datasets"]))
        step, seen, ledger = int(state["step"]), int(state["samples_seen"]), dict(state["ledger"])
        self._former = {i: n for i, n in ledger.items() if i not in self.identities}
        if same_order and same_datasets:
            segments = tuple(
                Segment(
                    int(s["start"]),
                    self._column(s["weights"]),
                    self._column(s["slots"]),
                    self._column(s["consumed"]),
                )
                for s in state["segments"]
            )
            return self._checked(Position(step, seen, segments))
        consumed = tuple(int(ledger.get(identity, 0)) for identity in self.identities)
        # Another order cannot go on inside an epoch: each dataset begins its next one.
        if not same_order:
            old = int(state["order"]["seq_len"])
            counts = [num_sequences(d.shard_tokens, old, packed=d.is_packed) for d in self.datasets]
            sizes = [max(int(count.sum()), 1) for count in counts]
            # n samples of `size` an epoch: the begun epoch counts as read, in the new epoch's size.
            consumed = tuple(
                -(-n // size) * o.epoch_size for n, size, o in zip(consumed, sizes, self.orders)
            )
        return self.mixture.begin(step=step, samples_seen=seen, consumed=consumed)

    def _column(self, values: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(values.get(identity, 0) for identity in self.identities)

    def _checked(self, position: Position) -> Position:
        """Refuse one that this program cannot have written: arithmetic would go on with it."""
        starts = [segment.start for segment in position.segments]
        is_one = (
            starts
            and starts == sorted(starts)
            and starts[-1] <= position.samples_seen
            and all(sum(segment.slots) == PERIOD for segment in position.segments)
        )
        if not is_one:
            raise DataError("the checkpoint's record of the data it was trained on is damaged.")
        return position

    def _accept(self, changes: list[str]) -> bool:
        """True when nothing changed, False when the user allowed the changes."""
        if changes and not self.allow_change:
            raise DataError(
                f"the checkpoint was made with other data: {'; '.join(changes)}. Restore the "
                "settings, or set data.allow_dataset_change=true to continue with what the config "
                "says now."
            )
        return not changes

    def _dataset_changes(self, saved: dict[str, Any]) -> list[str]:
        """A sentence for each dataset that left or joined; one moved elsewhere is no change."""
        gone = [
            f"{v['name']} ({v['path']}, sha256 {i[:12]})"
            for i, v in saved.items()
            if i not in self.identities
        ]
        new = [
            f"{d.name} ({d.path}, sha256 {d.identity[:12]})"
            for d in self.datasets
            if d.identity not in saved
        ]
        changes = [f"dataset {dataset} is not in the config" for dataset in gone]
        return changes + [f"dataset {dataset} is not in the checkpoint" for dataset in new]


def hash_addresses(identities: Sequence[str], samples: Samples, shard: Ints, sequence: Ints) -> str:
    """16 hex digits of samples in their order; the order of the datasets does not matter."""
    digest = hashlib.blake2b(" ".join(identities).encode(), digest_size=8)
    by_number = np.argsort(samples.number, kind="stable")
    for column in (samples.number, samples.source, shard, sequence):
        digest.update(column[by_number].astype("<i8").tobytes())
    return digest.hexdigest()


def _order(dataset: Dataset, index: int, cfg: DataConfig, *, seq_len: int, seed: int) -> Order:
    """The order of one dataset; refuses one without a single whole sequence.

    Each draws its own permutations, keyed by what it is, not by its place in the config.
    """
    key = int.from_bytes(
        hashlib.blake2b(f"{seed} {dataset.identity}".encode(), digest_size=8).digest(), "little"
    )
    for name in ("lanes", "window"):
        if getattr(cfg, name) < 1:
            raise ConfigError(f"data.{name} ({getattr(cfg, name)}) must be at least 1.")
    order = Order(
        dataset.shard_tokens,
        seq_len=seq_len,
        seed=key,
        lanes=cfg.lanes,
        window=cfg.window,
        packed=dataset.is_packed,
    )
    if not order.epoch_size:
        raise DataError(
            f"dataset {dataset.name} ({dataset.path}) has no sequence of {seq_len + 1} tokens: its "
            f"longest shard has {int(max(dataset.shard_tokens, default=0))}. "
            "Set a smaller training.seq_len, or prepare more text."
        )
    if dataset.max_epochs is not None and not 1 <= dataset.max_epochs * order.epoch_size < math.inf:
        raise ConfigError(
            f"max_epochs ({dataset.max_epochs}) of dataset {dataset.name} must be a finite number, "
            "and not less than one sequence. null sets no limit."
        )
    return order


def _stages(
    cfg: DataConfig, datasets: Sequence[Dataset]
) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """(first step, normalised weights) of data.train and of each entry of data.blend_schedule."""
    given = {d.name: d.weight for d in datasets}
    unset = [name for name, weight in given.items() if weight is None]
    if unset and len(unset) < len(given):
        raise ConfigError(
            f"data.train: give every dataset a weight, or none; {', '.join(unset)} has none."
        )
    base = {
        d.name: float(d.manifest.tokens) if d.weight is None else float(d.weight) for d in datasets
    }
    stages, last = [(0, _normalise(base, cfg.temperature, "data.train"))], 0
    for index, stage in enumerate(cfg.blend_schedule):
        where = f"data.blend_schedule[{index}]"
        if unknown := sorted(set(stage.weights) - set(base)):
            raise ConfigError(
                f"{where}.weights names {', '.join(unknown)}; "
                f"the datasets are {', '.join(sorted(base))}."
            )
        if stage.start_step <= last:
            raise ConfigError(f"{where}.start_step ({stage.start_step}) must be above {last}.")
        last = stage.start_step
        stages.append(
            (last, _normalise({n: stage.weights.get(n, 0.0) for n in base}, cfg.temperature, where))
        )
    return tuple(stages)


def _normalise(weights: dict[str, float], temperature: float, where: str) -> tuple[float, ...]:
    """Shares of the tokens, raised to 1 / temperature; their sum is 1."""
    total = sum(weights.values())
    # One that is infinite or no number would make every share NaN, which rounds to equal shares.
    if min(weights.values()) < 0 or not 0 < total < math.inf:
        raise ConfigError(
            f"{where}: weights must not be negative and not all 0, their sum a finite number: "
            f"{weights}."
        )
    if not 0 < temperature < math.inf:
        raise ConfigError(
            f"data.temperature ({temperature}) must be above 0 and finite; 1 leaves the weights as "
            "they are."
        )
    raised = [(w / total) ** (1 / temperature) if w else 0.0 for w in weights.values()]
    if not sum(raised):
        raise ConfigError(
            f"data.temperature ({temperature}) is so small that no weight is left: {weights}. Name "
            "the largest dataset alone, or set a temperature nearer to 1."
        )
    return tuple(w / sum(raised) for w in raised)


def _check_state(state: dict[str, Any]) -> None:
    """Refuse a checkpoint that says nothing of its data; types were checked with the record."""
    wanted = ("step", "samples_seen", "order", "ledger", "segments", "datasets")
    if missing := [key for key in wanted if key not in state]:
        raise DataError(
            f"the checkpoint does not say where its data stood: its loader has no "
            f"{', '.join(missing)}. Begin again under another name=..., with "
            "checkpoint.init_from=... to take over its weights."
        )


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{key} is {now[key]}, the checkpoint has {saved.get(key)}"
        for key in now
        if saved.get(key) != now[key]
    ]


def _by_source(samples: Samples) -> Iterator[tuple[int, Ints]]:
    """(dataset, places of its samples)."""
    for index in np.flatnonzero(np.bincount(samples.source)):
        yield int(index), np.flatnonzero(samples.source == index)
