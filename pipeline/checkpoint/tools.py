"""The commands of `python -m pipeline.checkpoint`: they print, and return an exit code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.adapters import Base, recorded_base
from pipeline.checkpoint.index import TensorIndex
from pipeline.checkpoint.record import RECORD, read_record
from pipeline.errors import CheckpointError
from pipeline.log import in_units


def _all_under(path: Path) -> list[Path]:
    """The checkpoints a user means: one, or all of a run, oldest first."""
    if (path / RECORD).is_file():
        return [path]
    newest = folders.find(path)
    return [folder for _, folder in folders.list_checkpoints(newest.parent)]


def list_all(path: Path) -> int:
    """One line a checkpoint."""
    found = _all_under(path)  # before the head of a table that would stay empty
    print(f"{'step':>10}  {'tokens':>16}  {'size':>8}  {'saved at':20}  folder")
    for folder in found:
        try:
            record = read_record(folder)
        except CheckpointError as error:
            print(f"{'?':>10}  damaged: {error}")
            continue
        size = in_units(record.size_bytes)
        counts = f"{record.step:>10}  {record.tokens_seen:>16}"
        print(f"{counts}  {size:>8}  {record.saved_at:20}  {folder}")
    return 0


def verify(path: Path) -> int:
    """Read every byte; 1 when one differs from what was written."""
    is_damaged = False
    for folder in _all_under(path):
        problems = folders.damage(folder)
        is_damaged |= bool(problems)
        print(f"{folder}: {'DAMAGED' if problems else 'good'}")
        for problem in problems:
            print(f"  {problem}")
    return int(is_damaged)


def show(path: Path) -> int:
    """Record and parameters of one checkpoint (of a run: its newest)."""
    folder = folders.find(path)
    record, tensors = read_record(folder), TensorIndex(folder)
    print(f"folder: {folder}")
    if record.base is not None:
        print(f"holds: a part of a model, beside the base in {record.base['path']}")
    for key, value in _flat(
        {k: v for k, v in json.loads(record.to_json()).items() if k != "loader"}
    ):
        print(f"{key}: {value}")
    shapes = {name: tensors.shape(f"weights/{name}") for name in tensors.parameters}
    print(f"optimizer state: {', '.join(tensors.optimizer_keys) or 'none'}")
    print(f"parameters: {sum(map(math.prod, shapes.values())):,} in {len(shapes)} tensors")
    for name, shape in shapes.items():
        print(f"  {name}  {tuple(shape)}")
    return 0


def diff(first: Path, second: Path) -> int:
    """Largest difference of every weight and optimizer entry; 1 when anything differs."""
    from pipeline.checkpoint.tensors import CheckpointTensors

    a, b = CheckpointTensors(folders.find(first)), CheckpointTensors(folders.find(second))
    print(f"a: {a.folder}\nb: {b.folder}")
    if apart := _unlike(*(recorded_base(read_record(tensors.folder)) for tensors in (a, b))):
        print(apart)
    lonely = sorted(set(a.names) ^ set(b.names))
    for name in lonely:
        print(f"only in {'a' if name in a.names else 'b'}: {name}")
    differs = bool(lonely)
    print(f"{'max |a - b|':>12}  {'rms(a - b)':>12}  {'rms(a)':>12}  entry")
    for name in sorted(set(a.names) & set(b.names)):
        if a.shape(name) != b.shape(name):
            print(f"{'shapes':>12}  {a.shape(name)} {b.shape(name)}  {name}")
            differs = True
            continue
        x, y = a.tensor(name), b.tensor(name)
        delta = x - y
        largest = float(delta.abs().max())
        differs |= largest != 0.0
        print(f"{largest:12.4e}  {_rms(delta):12.4e}  {_rms(x):12.4e}  {name}")
    return int(differs)


def _unlike(a: Base | None, b: Base | None) -> str:
    """Why two checkpoints with these bases are no states of one model; empty: they may be."""
    if a is not None and b is not None:
        if a.sha256 == b.sha256:
            return ""
        return (
            f"a and b are parts of different models: a beside {a.path} (sha256 "
            f"{a.sha256[:16]}...), b beside {b.path} ({b.sha256[:16]}...)"
        )
    base = a or b
    if base is None:
        return ""
    part, whole = ("a", "b") if a is not None else ("b", "a")
    return (
        f"{part} is a part of a model, beside the base in {base.path}, and {whole} is a whole one: "
        f"python -m pipeline.checkpoint merge makes a whole one of {part}"
    )


def _rms(x: Any) -> float:
    return float(x.double().square().mean().sqrt())


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """[(dotted key, value)] of nested dicts."""
    rows: list[tuple[str, Any]] = []
    for key, inner in value.items():
        rows += (
            _flat(inner, f"{prefix}{key}.")
            if isinstance(inner, dict) and inner
            else [(prefix + key, inner)]
        )
    return rows
