"""Which steps of a run have trained on these documents? And the last checkpoint before them.

    python -m data_prep.trace DATASET input=remove.jsonl places=places.json
    python -m pipeline.trace runs/NAME places=places.json

    places -> sequences of their shards --the run's order--> samples, steps
           -> the newest checkpoint that has seen none of them

The order is a function of the seed and the datasets, so nothing had to be logged: the newest
checkpoint says where it stood, and every sample before is computed again. Where a run's data were
changed (data.allow_dataset_change), the checkpoint that it went on from says what was read before.
Needs no torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING

from pipeline import cli
from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.record import CheckpointRecord, read_record
from pipeline.checkpoint.seen import Seen
from pipeline.data.mixture import Ints
from pipeline.errors import CheckpointError, DataError
from pipeline.redaction import redact
from pipeline.shapes import read_object

SHAPE = {
    "format": str,
    "dataset": str,
    "places": [
        {
            "given": str,
            "document": range(2**62),
            "spans": [{"shard": range(2**31), "begin": range(2**62), "end": range(2**62)}],
        }
    ],
    "not_found": [str],
}
SHOWN = 20  # steps, and runs of windows, on the terminal


@dataclass(frozen=True)
class Windows:
    """Windows of a dataset as runs of their numbers in it: ascending, apart."""

    begins: Ints
    ends: Ints
    firsts: Ints
    """(shards + 1,) number of each shard's first window; last, of all."""

    def count(self) -> int:
        """How many there are."""
        return int((self.ends - self.begins).sum())

    def names(self) -> Iterator[str]:
        """`shard:first-last` of every run, counted in the shard, cut where a shard ends."""
        for begin, end in zip(self.begins.tolist(), self.ends.tolist(), strict=True):
            while begin < end:
                # Of shards without a window, which begin at the same number, the last one counts.
                shard = int(np.searchsorted(self.firsts, begin, "right")) - 1
                first, stop = int(self.firsts[shard]), min(end, int(self.firsts[shard + 1]))
                last = f"-{stop - 1 - first}" if stop > begin + 1 else ""
                yield f"{shard}:{begin - first}{last}"
                begin = stop


@dataclass
class TraceConfig:
    """Settings of pipeline.trace."""

    checkpoint: str = MISSING
    """A run folder (up to its newest checkpoint), or one checkpoint."""
    places: str = MISSING
    """File that data_prep.trace has written of the run's dataset."""


def main(cfg: TraceConfig) -> int:
    """Print the windows, the steps and the checkpoint.

    Returns:
        1 if a step has used one of the documents, or if that cannot be told; else 0.

    Raises:
        DataError: the places are of a dataset that the run has not read, or are damaged.
        CheckpointError: there is no checkpoint, or it does not say where the data stood.
    """
    folder = folders.find(Path(cfg.checkpoint))
    records, begin = stretches(folder)
    places = read_places(Path(cfg.places))
    read = [record for record in records if places["dataset"] in record.datasets]
    if not read:
        known = {i: d["name"] for record in records for i, d in record.datasets.items()}
        names = ", ".join(f"{name} ({i[:12]})" for i, name in known.items())
        lost = f" {_lost(begin)}." if begin else ""
        raise DataError(
            f"{cfg.places} is of the dataset {places['dataset'][:12]}, which {folder} has not "
            f"been trained on; that was {names}. Trace the documents in that dataset.{lost}"
        )
    found = [samples_with(record, places) for record in read]
    windows = found[-1][1]
    print(
        f"{len(places['places']):,} places in {windows.count():,} windows of "
        f"{read[-1].loader['order']['seq_len']:,} tokens"
    )
    if runs := list(islice(windows.names(), SHOWN + 1)):
        more = ", and more" if len(runs) > SHOWN else ""
        print(f"windows, as shard:number: {', '.join(runs[:SHOWN])}{more}")
    numbers = np.concatenate([numbers for numbers, _ in found])
    _print_found(folder, records[-1], numbers)
    if begin:
        print(_lost(begin))
    if started_from := _started_from(records[0]):
        print(redact(f"the run began with the weights of {started_from}: trace that one too"))
    return 1 if len(numbers) or begin else 0


def _lost(begin: int) -> str:
    """What to say of samples whose order nobody knows any more."""
    return (
        f"the data were changed at sample {begin:,}, and no checkpoint is left that says in which "
        "order the samples before were read: whether one of them holds a document cannot be told"
    )


def _print_found(folder: Path, newest: CheckpointRecord, numbers: Ints) -> None:
    """The steps that read these samples, and the checkpoint to go back to."""
    if not len(numbers):
        print(redact(f"{folder}: none of them was read in {newest.step:,} steps"))
        return
    steps = steps_of(newest, numbers)
    shown = ", ".join(f"{step:,}" for step in steps[:SHOWN].tolist())
    more = f" and {len(steps) - SHOWN:,} more" if len(steps) > SHOWN else ""
    print(f"read {len(numbers):,} times, in {len(steps):,} steps: {shown}{more}")
    if (counted := _samples_until(newest, newest.step)) != newest.state["samples_seen"]:
        print(
            f"steps are counted as the newest settings have them, {counted:,} samples until now; "
            f"the run has read {newest.state['samples_seen']:,}: its batch was of another size "
            "once, or a rollback has skipped some. The checkpoint below is right nevertheless"
        )
    before = last_before(folder.parent, int(numbers[0]))
    if before is None:
        print("no checkpoint that is left is from before the first of them")
    else:
        print(redact(f"the last checkpoint before the first of them: {before}"))


def stretches(folder: Path) -> tuple[list[CheckpointRecord], int]:
    """Checkpoints that together know the order of a run, oldest first; the first sample they know.

    Where the data of a run were changed its order began anew, and what it was before is in the
    checkpoint that the run went on from.

    Raises:
        CheckpointError: the checkpoint does not say where the data stood.
    """
    newest = read_record(folder)
    knows_order = {"seq_len", "seed"} <= newest.loader.get("order", {}).keys()
    if not (knows_order and newest.loader.get("segments") and "samples_seen" in newest.state):
        raise CheckpointError(
            f"{folder} does not say where its run stood in the data, as it was not written by "
            "pipeline.train. Trace the run whose weights it has."
        )
    records = [newest]
    while (begin := _begin_of(records[0])) > 0:
        known = (
            record
            for record in _others(folder.parent)
            if record.state.get("samples_seen") == begin and _begin_of(record) < begin
        )
        if (earlier := next(known, None)) is None:
            break
        records.insert(0, earlier)
    return records, begin


def _begin_of(record: CheckpointRecord) -> int:
    """The first sample of the order that a checkpoint knows; larger than any where it has none."""
    return min((s["start"] for s in record.loader.get("segments", ())), default=2**62)


def _others(root: Path) -> Iterator[CheckpointRecord]:
    """Records of a folder's checkpoints; damaged ones are none."""
    for _, folder in folders.list_checkpoints(root):
        with contextlib.suppress(CheckpointError):
            yield read_record(folder)


def _started_from(record: CheckpointRecord) -> str | None:
    """Of which weights a run was begun: they may have seen what it has not."""
    section = record.config.get("checkpoint")
    path = section.get("init_from") if isinstance(section, dict) else None
    return path if isinstance(path, str) else None


def read_places(path: Path) -> dict[str, Any]:
    """The file of data_prep.trace.

    Raises:
        DataError: it cannot be read, or is none.
    """
    return read_object(
        path,
        SHAPE,
        error=DataError,
        misfit="is not what data_prep.trace writes",
        advice="Make it again.",
    )


def samples_with(record: CheckpointRecord, places: dict[str, Any]) -> tuple[Ints, Windows]:
    """Samples that hold a token of a place.

    Returns:
        Numbers, ascending, of those read before the checkpoint; the windows of the dataset that
        hold such a token.
    """
    seen = Seen(record)
    source = seen.sampler.identities.index(places["dataset"])
    firsts = seen.firsts(source)
    begins, ends = _runs(places, firsts, seen.seq_len)
    found = []
    for numbers, windows in seen.windows(source):
        run = np.searchsorted(begins, windows, "right") - 1
        found.append(numbers[(run >= 0) & (windows < ends[run])] if len(begins) else numbers[:0])
    numbers = np.concatenate(found) if found else np.zeros(0, np.int64)
    return numbers, Windows(begins, ends, firsts)


def _runs(places: dict[str, Any], first: Ints, seq_len: int) -> tuple[Ints, Ints]:
    """(begins, ends) of the runs of windows that read a token of a place; ascending, apart.

    Window s of a shard reads the tokens s * seq_len to (s + 1) * seq_len, both included: the last
    one is a label here and the first input of the next window, so a document that begins there is
    in both. Runs, not windows: a file of a stranger may name the whole dataset a thousand times.
    """
    runs: list[tuple[int, int]] = []
    for place in places["places"]:
        for span in place["spans"]:
            shard = span["shard"]
            if shard >= len(first) - 1:
                raise DataError(
                    f"document {place['document']} is said to be in shard {shard}, and the dataset "
                    f"has {len(first) - 1}. Make the places again."
                )
            begin = int(first[shard]) + max(-(-span["begin"] // seq_len) - 1, 0)
            end = int(first[shard]) + (span["end"] - 1) // seq_len + 1
            runs.append((begin, min(end, int(first[shard + 1]))))
    apart: list[list[int]] = []
    for begin, end in sorted(run for run in runs if run[0] < run[1]):
        if apart and begin <= apart[-1][1]:
            apart[-1][1] = max(apart[-1][1], end)
        else:
            apart.append([begin, end])
    columns = np.array(apart, np.int64).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]


def steps_of(record: CheckpointRecord, numbers: Ints) -> Ints:
    """Steps, counted from 1 as the log counts them, that read these samples; ascending, each once.

    As the checkpoint's settings have them. A rollback over bad data skips samples without a step,
    and a run may have gone on with another batch: behind those, steps are counted otherwise, and
    last_before, which compares samples, is right nevertheless.
    """
    ends, sizes, at, samples = [], [], 0, 0
    for until, size in _step_sizes(record):
        ends.append((samples, at, size))
        samples, at = samples + (until - at) * size, until
        sizes.append(samples)
    stage = np.searchsorted(sizes, numbers, "right")
    begins, first_steps, size_of = (np.array(column, np.int64) for column in zip(*ends))
    steps = first_steps[stage] + (numbers - begins[stage]) // size_of[stage] + 1
    return np.unique(steps)


def _samples_until(record: CheckpointRecord, step: int) -> int:
    """Samples that so many steps read, by the checkpoint's settings."""
    at = samples = 0
    for until, size in _step_sizes(record):
        samples += (min(until, step) - min(at, step)) * size
        at = until
    return samples


def _step_sizes(record: CheckpointRecord) -> Iterator[tuple[int, int]]:
    """(until_step, samples a step) of every stage of the ramp and of what follows it."""
    training, seq_len = record.training(), record.loader["order"]["seq_len"]
    for stage in training.ramp:
        batch = stage.global_batch_size or training.global_batch_size
        size = batch // (seq_len // (stage.seq_len or seq_len) or 1)
        if size < 1:
            raise CheckpointError(f"its ramp has a stage of {size} samples a step: no run has.")
        yield stage.until_step, size
    yield 2**40, training.global_batch_size


def last_before(root: Path, sample: int) -> Path | None:
    """The newest checkpoint of a folder that had not read this sample yet."""
    found = None
    for _, folder in folders.list_checkpoints(root):
        try:
            seen = read_record(folder).state["samples_seen"]
        except CheckpointError:
            continue  # damaged: not one to go back to
        if seen <= sample:
            found = folder
    return found


if __name__ == "__main__":
    cli.run(main, TraceConfig, config="trace_run", positional=["checkpoint"])
