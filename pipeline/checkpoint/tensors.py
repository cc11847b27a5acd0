"""Tensors of a checkpoint: rectangles of named fp32 tensors, in safetensors files with an index.

    fragments --take--> chunks on the host --write--> rank-00000.safetensors ..., tensors.json
    CheckpointTensors(folder).read_into(chunks) | .tensor(name)    any rectangle, by any processes

Names: weights/<parameter>, and <optimizer state>/<parameter>, such as
exp_avg/layers.0.mlp.linear_fc1.weight. Shapes are whole and unpadded. Reading needs no DeepSpeed
and no process group, and runs no code of the checkpoint: tensors.json is JSON, safetensors holds
nothing but numbers. Checkpoints of version 1 are read by dcp.py.
"""

from __future__ import annotations

import json
import math
import threading
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.agreement import Agreement
from pipeline.checkpoint.folder import INDEX
from pipeline.checkpoint.index import FORMAT, VERSION, TensorIndex, file_name, key_of
from pipeline.checkpoint.rectangles import Rectangle, check_filled
from pipeline.checkpoint.safetensors_file import write_safetensors
from pipeline.errors import CheckpointError
from pipeline.files import regular_file, write_durably
from pipeline.model.fragments import Chunk, Fragment, chunks_of

PINNED_ELEMENTS = 1 << 28  # of a block, 1 GiB
FILE_BYTES = 1 << 30
"""Of a file, about: a thread takes SHA-256 of 0.5 to 2 GB/s; several share what a rank wrote."""


class HostCopy:
    """Host memory that every save reuses: pages are faulted in, or pinned, once."""

    def __init__(self, *, num_threads: int = 1) -> None:
        """Args: num_threads: that copy what is on the host already; a device copies by itself."""
        self.num_threads = num_threads
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @torch.no_grad()
    def take(self, fragments: Iterable[Fragment]) -> list[Chunk]:
        """Copies of all the owned fragments hold. Training may go on when this returns."""
        chunks = [
            chunk
            for fragment in fragments
            if fragment.is_owned
            for chunk in chunks_of(fragment, fragment.views)
        ]
        self._make_room([c for c in chunks if (c.name, c.offsets) not in self._buffers])
        copies, on_host, is_on_device = [], [], False
        for chunk in chunks:
            source, copy = chunk.data, self._buffers[chunk.name, chunk.offsets]
            if source.is_cuda:
                copy.copy_(source, non_blocking=True)
                is_on_device = True
            else:
                on_host.append((copy, source))
            copies.append(Chunk(chunk.name, chunk.whole_shape, chunk.offsets, copy))
        if on_host:
            # One core copies 12 to 16 GB/s, below what the memory gives. A chunk has 64 MiB at
            # most, so that an embedding does not keep one thread alone.
            with ThreadPoolExecutor(self.num_threads) as pool:
                list(pool.map(lambda pair: pair[0].copy_(pair[1]), on_host))
        if is_on_device:
            torch.cuda.synchronize()
        return copies

    def _make_room(self, chunks: list[Chunk]) -> None:
        """Buffers for chunks that have none; those of a device lie pinned, many to a block."""
        pinned = [chunk for chunk in chunks if chunk.data.is_cuda]
        for chunk in chunks:
            if not chunk.data.is_cuda:
                self._buffers[chunk.name, chunk.offsets] = torch.empty(
                    chunk.data.shape, dtype=torch.float32
                )
        for size, members in pinned_blocks([chunk.data.numel() for chunk in pinned]):
            block = torch.empty(size, dtype=torch.float32, pin_memory=True)
            for index, start in members:
                chunk = pinned[index]
                part = block[start : start + chunk.data.numel()].view(chunk.data.shape)
                self._buffers[chunk.name, chunk.offsets] = part


def pinned_blocks(sizes: list[int]) -> list[tuple[int, list[tuple[int, int]]]]:
    """[(elements of a block, [(index into sizes, first element in the block)])].

    torch rounds a pinned allocation up to a power of two, so that a block for each chunk could pin
    twice what a checkpoint needs: 83 GiB and more for 7e9 parameters. A block is as large as a
    power of two; of the last one at most half is empty, of the others less than a chunk.
    """
    blocks: list[tuple[int, list[tuple[int, int]]]] = []
    left, room, start = sum(sizes), 0, 0
    for index, size in enumerate(sizes):
        if start + size > room:
            room = min(PINNED_ELEMENTS, 1 << max(0, left - 1).bit_length())
            room, start = max(room, 1 << max(0, size - 1).bit_length()), 0
            blocks.append((room, []))
        blocks[-1][1].append((index, start))
        start, left = start + size, left - size
    return blocks


# ---- write ---------------------------------------------------------------------------------------


def write(chunks: list[Chunk], folder: Path, *, ranks: Agreement) -> dict[str, str]:
    """Write all ranks' chunks; SHA-256 by file name of what this rank wrote. Collective.

    Raises:
        CheckpointError: a rank could not write, or the chunks do not fill their tensors exactly;
            raised on every rank.
    """
    files = _files_of(chunks, ranks.rank, ranks.world_size)
    parts = ranks.gather_on_main(
        [
            (number, c.name, c.whole_shape, c.offsets, tuple(c.data.shape))
            for number, members in files.items()
            for c in members
        ]
    )

    def write_own() -> dict[str, str]:
        sums = {}
        # Whoever finds a fault in the parts, all ranks fail: nothing is published.
        index = index_of(part for own in parts for part in own) if ranks.rank == 0 else None
        for number, members in files.items():
            shapes = {key_of(c.name, c.offsets): tuple(c.data.shape) for c in members}
            values = (chunk.data for chunk in members)
            name = file_name(number)
            _, sums[name] = write_safetensors(folder / name, shapes, values, torch.float32)
        if ranks.rank == 0:
            sums[INDEX] = write_durably(folder / INDEX, json.dumps(index).encode())
        return sums

    return ranks.agree(write_own)


def _files_of(chunks: list[Chunk], rank: int, world_size: int) -> dict[int, list[Chunk]]:
    """By the number of their file: rank, rank + world_size, ..., alike in size."""
    size, start = sum(chunk.data.nbytes for chunk in chunks), 0
    count = -(-size // FILE_BYTES)
    share = -(-size // max(1, count)) or 1
    files: dict[int, list[Chunk]] = defaultdict(list)
    for chunk in chunks:
        files[rank + world_size * (start // share)].append(chunk)
        start += chunk.data.nbytes
    return files


def index_of(parts: Iterable[tuple]) -> dict[str, Any]:
    """tensors.json, from (number of the file, name, whole shape, offsets, sizes) of every chunk.

    Raises:
        CheckpointError: rectangles of a tensor overlap, reach over its edge, or leave a hole.
    """
    entries: dict[str, dict[str, Any]] = {}
    for number, name, shape, offsets, sizes in parts:
        entry = entries.setdefault(name, {"shape": shape, "rectangles": []})
        if entry["shape"] != shape:
            raise CheckpointError(f"{name} is {entry['shape']} on one rank and {shape} here")
        entry["rectangles"].append([number, offsets, sizes])
    for name, entry in entries.items():
        check_filled(name, entry["shape"], [(o, s) for _, o, s in entry["rectangles"]])
    return {"format": FORMAT, "version": VERSION, "dtype": "F32", "tensors": entries}


# ---- read ----------------------------------------------------------------------------------------


class CheckpointTensors(TensorIndex):
    """The tensors of one checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._load = self._load_version_1 or _Files(folder).load

    def tensor(self, name: str) -> Tensor:
        """A whole entry, fp32 on the host."""
        data = torch.empty(self.shape(name))
        self.read_into([Chunk(name, tuple(data.shape), (0,) * data.dim(), data)])
        return data

    def read_into(self, chunks: Iterable[Chunk], *, num_threads: int = 4) -> None:
        """Fill each chunk's data, on whatever device it is. Every stored rectangle is read once.

        Raises:
            CheckpointError: an entry is missing, has another shape, or is not stored in full.
        """
        # place -> [(stored rectangle, its slices, slices of a chunk, the chunk's data)]
        wanted: dict[Any, list[tuple]] = defaultdict(list)
        for chunk in chunks:
            for rectangle, source, target in self._parts(chunk):
                wanted[rectangle.place].append((rectangle, source, target, chunk.data))

        def read(place: Any) -> None:
            stored = self._load(place)
            for rectangle, source, target, destination in wanted[place]:
                if tuple(stored.shape) != rectangle.sizes:
                    raise CheckpointError(
                        f"{self.folder}: {place[1]} in {place[0]} is {tuple(stored.shape)}, the "
                        f"index says {rectangle.sizes}."
                    )
                destination[target].copy_(stored[source])

        with torch.no_grad(), ThreadPoolExecutor(num_threads) as pool:
            for _ in pool.map(read, sorted(wanted)):
                pass

    def _parts(self, chunk: Chunk) -> list[tuple[Rectangle, tuple[slice, ...], tuple[slice, ...]]]:
        """(stored rectangle, its slices, the chunk's slices) wherever the two meet."""
        entry = self._entry(chunk.name)
        if entry.shape != chunk.whole_shape:
            raise CheckpointError(
                f"{chunk.name} is {entry.shape} in {self.folder} and {chunk.whole_shape} in this "
                "model. Both must have the same sizes; see config.model in its checkpoint.json."
            )
        found, count = [], 0
        for stored, part in entry.meeting(chunk.offsets, chunk.data.shape):
            count += math.prod(side.stop - side.start for side in part)
            source, target = (
                tuple(slice(side.start - o, side.stop - o) for side, o in zip(part, offsets))
                for offsets in (stored.offsets, chunk.offsets)
            )
            found.append((stored, source, target))
        if count != chunk.data.numel():
            raise CheckpointError(f"{chunk.name} is not stored in full in {self.folder}.")
        return found


class _Files:
    """The safetensors files of a folder, each opened once a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._of_thread = folder, threading.local()

    def load(self, place: tuple[str, str]) -> Tensor:
        """A rectangle, a view of the mapped file.

        Raises:
            CheckpointError: it is not there, or not fp32.
        """
        from safetensors import safe_open

        name, key = place
        try:
            files = vars(self._of_thread)
            if name not in files:
                files[name] = safe_open(regular_file(self._folder / name), "pt")
            found: Tensor = files[name].get_tensor(key)
        except Exception as error:  # safetensors' own error type is not public
            raise CheckpointError(
                f"{self._folder / name}: {key} cannot be read: {error}."
            ) from None
        if found.dtype is not torch.float32:
            raise CheckpointError(f"{self._folder / name}: {key} is {found.dtype}, not fp32.")
        return found
