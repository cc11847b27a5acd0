"""The stages of a cleaning job: work units that depend on inputs and recipe alone.

    pass 0 (a unit an input unit) -> links (a unit a column and range of keys)
    -> repeats (one unit) -> pass 1 -> ...

Files of pass P in the folder files-P of the job's work folder; U is the number of the input unit:
    documents-U.jsonl.zst      survivors; those of the last pass go to
                               OUT/documents/<source>/U.jsonl.zst
    keys-<dedup>-U.npy         keys of the survivors (clean_pass.KeyCollector)
    links-<dedup>-C-R.npy      (n, 2) uint64, from column C and range R of the keys
    repeats.npy                REPEAT rows, sorted by document
OUT/dropped/pass-P-U.jsonl.zst: a line for each document dropped in pass P or not readable.
A document's number in a pass is U << 32 | row among the survivors. Every file gets its final name
when it is whole.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import orjson
import zstandard

from data_prep.cleaning import dedup, recipes
from data_prep.cleaning.filters import Step, build_step
from data_prep.cleaning.one_pass import KeyCollector, Tally, clean_documents
from data_prep.jobs import WORK_FOLDER
from data_prep.sources.documents import read_documents
from data_prep.sources.inputs import InputConfig, Unit
from data_prep.sources.rejects import Document, Rejects
from pipeline.files import whole_file

KEYS_PER_RANGE = 1 << 25
"""Keys sorted at once by one links unit; 32 Mi take about 3 GB of memory."""
REPEAT = np.dtype([("document", "<u8"), ("dedup", "u1")])  # dedup: its place in the pass's list
LinkUnit = tuple[str, int, int, int]
"""Deduplication, column of its keys, range, number of ranges."""


@dataclass(frozen=True)
class Plan:
    """What every worker of the job must know."""

    recipe: recipes.Recipe
    input: InputConfig
    passes: list[recipes.Pass]
    output: Path
    num_units: int

    @property
    def work(self) -> Path:
        """Folder that goes when the job is done; files that grow are there."""
        return self.output / WORK_FOLDER

    def file(self, number: int, name: str) -> Path:
        """A file of pass `number` in the work folder."""
        return self.work / f"files-{number}" / name

    def documents(self, number: int, unit: Unit) -> Path:
        """Where pass `number` puts the survivors of a unit."""
        if number == len(self.passes) - 1:
            return self.output / "documents" / unit.source / f"{unit.number:06d}.jsonl.zst"
        return self.file(number, f"documents-{unit.number:06d}.jsonl.zst")


def run_pass(plan: Plan, number: int, unit: Unit) -> dict[str, Any]:
    """Put one unit through pass `number`; gives its tally and its number of survivors."""
    now = plan.passes[number]
    before = plan.passes[number - 1].dedups if number else ()
    repeats = _repeats_of(plan, number - 1, unit.number) if number else {}
    rejects = Rejects(plan.input.on_error)
    documents = (
        read_survivors(plan.documents(number - 1, unit))
        if number
        else read_documents(unit, plan.input, rejects)
    )
    lost = plan.output / "dropped" / f"pass-{number}-{unit.number:06d}.jsonl.zst"
    tally, keys, survivors = Tally(), KeyCollector(now.dedups, plan.recipe), 0
    with (
        zstd_lines(plan.documents(number, unit), scratch=plan.work) as kept,
        zstd_lines(lost, scratch=plan.work) as dropped,
    ):

        def on_drop(document: Document, step: str, reason: str, size: int) -> None:
            row = {
                "id": document.id,
                "source": document.source,
                "step": step,
                "reason": reason,
                "bytes": size,
            }
            dropped.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))

        for document in clean_documents(
            documents,
            repeats=repeats,
            dedups=before,
            steps=_steps(plan, number),
            on_drop=on_drop,
            tally=tally,
        ):
            kept.write(orjson.dumps(asdict(document), option=orjson.OPT_APPEND_NEWLINE))
            keys.add(document.text)
            survivors += 1
        for row in rejects.rows:
            dropped.write(orjson.dumps({"step": "input", **row}, option=orjson.OPT_APPEND_NEWLINE))
            tally.record_reject(row["reason"])
    for name, columns in keys.columns().items():
        save_array(plan.file(number, f"keys-{name}-{unit.number:06d}.npy"), columns)
    return {"survivors": survivors, **asdict(tally)}


def link_units(plan: Plan, number: int, survivors: int) -> list[LinkUnit]:
    """The units of the links stage after pass `number`."""
    ranges = 1
    while ranges * KEYS_PER_RANGE < survivors:
        ranges *= 2
    columns = {"exact_dedup": 1, "minhash_dedup": plan.recipe.minhash_dedup.bands}
    return [
        (name, column, part, ranges)
        for name in plan.passes[number].dedups
        for column in range(columns[name])
        for part in range(ranges)
    ]


def link_keys(plan: Plan, number: int, link_unit: LinkUnit) -> dict[str, Any]:
    """Find the documents of the whole corpus that share a key of one column and range."""
    name, column, part, ranges = link_unit
    keys, documents = [], []
    for unit in range(plan.num_units):
        table = np.load(plan.file(number, f"keys-{name}-{unit:06d}.npy"), mmap_mode="r")[column]
        begin, end = (
            bisect.bisect_left(table, (bound << 64) // ranges, key=lambda row: int(row["key"][-1]))
            for bound in (part, part + 1)
        )
        keys.append(np.array(table["key"][begin:end]))
        documents.append(table["row"][begin:end].astype("<u8") | np.uint64(unit << 32))
    found = dedup.links(np.concatenate(keys), np.concatenate(documents))
    save_array(plan.file(number, f"links-{name}-{column:03d}-{part:05d}.npy"), found)
    return {"links": len(found)}


def name_repeats(plan: Plan, number: int, units: list[LinkUnit]) -> dict[str, Any]:
    """Join all columns' links to clusters, and name all documents but the first of each.

    A document that several deduplications would drop counts as the first one's.
    """
    edges = {name: [np.zeros((0, 2), "<u8")] for name in plan.passes[number].dedups}
    for name, column, part, _ in units:
        path = plan.file(number, f"links-{name}-{column:03d}-{part:05d}.npy")
        edges[name].append(np.unique(np.load(path), axis=0))
    moved, _ = dedup.clusters(np.concatenate(sum(edges.values(), [])))
    repeats = np.zeros(len(moved), REPEAT)
    repeats["document"] = moved
    for place, parts in reversed(list(enumerate(edges.values()))):
        alone, _ = dedup.clusters(np.concatenate(parts))
        repeats["dedup"][np.isin(moved, alone)] = place
    save_array(plan.file(number, "repeats.npy"), repeats)
    return {"repeats": len(repeats)}


def _repeats_of(plan: Plan, number: int, unit: int) -> dict[int, str]:
    """Row -> deduplication, for the repeats that pass `number` found in a unit."""
    table = np.load(plan.file(number, "repeats.npy"), mmap_mode="r")
    begin, end = (
        bisect.bisect_left(table, bound << 32, key=lambda row: int(row["document"]))
        for bound in (unit, unit + 1)
    )
    names = plan.passes[number].dedups
    return {int(row["document"]) & 0xFFFFFFFF: names[row["dedup"]] for row in table[begin:end]}


_STEPS: dict[tuple[str, int], list[tuple[str, Step]]] = {}


def _steps(plan: Plan, number: int) -> list[tuple[str, Step]]:
    """The functions of a pass; models and lists are loaded once in each worker."""
    key = (str(plan.output), number)
    if key not in _STEPS:
        _STEPS.clear()
        _STEPS[key] = [(name, build_step(name, plan.recipe)) for name in plan.passes[number].steps]
    return _STEPS[key]


def read_survivors(path: Path) -> Iterator[Document]:
    """The documents that a pass left in a file."""
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        for line in io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20):
            yield Document(**orjson.loads(line))


@contextmanager
def zstd_lines(path: Path, *, scratch: Path) -> Iterator[BinaryIO]:
    """A file for JSON lines, compressed with zstandard, that appears when the block ends."""
    with (
        whole_file(path, scratch=scratch) as file,
        zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False) as stream,
    ):
        buffer = io.BufferedWriter(cast(io.RawIOBase, stream), 1 << 20)
        yield cast(BinaryIO, buffer)
        buffer.flush()
        buffer.detach()


def save_array(path: Path, array: np.ndarray) -> None:
    """np.save that appears whole or not at all."""
    with whole_file(path) as file:
        np.save(file, array)
