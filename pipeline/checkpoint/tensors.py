"""Named fp32 tensors as rectangles in the files of torch's distributed checkpoint (DCP).

    fragments --stage--> chunks on the host --write--> __<rank>_0.distcp, .metadata, their SHA-256
    CheckpointTensors(folder).read_into(chunks) | .tensor(name): any rectangle, any number of ranks

Names: weights/<parameter>, and <optimizer state>/<parameter>, such as
exp_avg/layers.0.mlp.linear_fc1.weight. Shapes are whole and unpadded. Reading needs torch only: no
DeepSpeed, no process group.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from pipeline.errors import CheckpointError
from pipeline.model.fragments import Chunk, Fragment, chunks_of


class HostCopy:
    """Host memory that every save reuses: pages are faulted in, or pinned, once."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @torch.no_grad()
    def take(self, fragments: Iterable[Fragment]) -> list[Chunk]:
        """Copies of all the owned fragments hold. Training may go on when this returns."""
        copies, is_on_device = [], False
        for fragment in fragments:
            if not fragment.is_owned:
                continue
            for chunk in chunks_of(fragment, fragment.views):
                source = chunk.data
                is_on_device |= source.is_cuda
                place = (chunk.name, chunk.offsets)
                if place not in self._buffers:
                    # One storage a chunk: DCP copies tensors that are views of larger storages.
                    self._buffers[place] = torch.empty(
                        source.shape, dtype=torch.float32, pin_memory=source.is_cuda
                    )
                copy = self._buffers[place].copy_(source, non_blocking=True)
                copies.append(Chunk(chunk.name, chunk.whole_shape, chunk.offsets, copy))
        if is_on_device:
            torch.cuda.synchronize()
        return copies


def write(chunks: list[Chunk], folder: Path, *, group: dist.ProcessGroup) -> dict[str, str]:
    """Write all ranks' chunks; returns SHA-256 by file name of the files this rank wrote.

    Collective over `group`.

    Raises:
        CheckpointError: a rank could not write; raised on every rank.
    """
    writer = _Writer(folder)
    try:
        dcp.save({}, storage_writer=writer, planner=_Planner(chunks), process_group=group)
    except CheckpointException as error:  # not an Exception: it would end a thread without a word
        rank, (cause, _) = min(error.failures.items())
        raise CheckpointError(f"rank {rank}: {type(cause).__name__}: {cause}") from cause
    return writer.digests


class _Planner(DefaultSavePlanner):
    """Every rank writes the rectangles it was given; DCP checks that they fill each tensor."""

    def __init__(self, chunks: list[Chunk]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._data = {(chunk.name, chunk.offsets): chunk.data for chunk in chunks}
        self._items = [_write_item(chunk) for chunk in chunks]

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._data[index.fqn, tuple(index.offset or ())]


def _write_item(chunk: Chunk) -> WriteItem:
    offsets = torch.Size(chunk.offsets)
    return WriteItem(
        index=MetadataIndex(chunk.name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=chunk.data.size()),
            properties=TensorProperties(dtype=chunk.data.dtype),
            size=torch.Size(chunk.whole_shape),
        ),
    )


class _Writer(FileSystemWriter):
    """DCP's writer, which syncs its files, and remembers the checksum of what it wrote."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0)
        self.fs = files = _HashingFiles()
        self.digests = files.digests


class _HashingFiles(FileSystem):
    """A file system that hashes on the way and checks afterwards that every byte arrived."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as raw:
            if mode != "wb":
                yield raw
                return
            stream = _HashingStream(raw)
            yield stream
        written = os.stat(path).st_size
        if written != stream.position:
            raise OSError(f"{path} has {written} bytes, {stream.position} were written")
        self.digests[Path(path).name] = stream.digest.hexdigest()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _HashingStream(io.RawIOBase):
    def __init__(self, raw: Any) -> None:
        self.raw, self.digest, self.position = raw, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        count = len(memoryview(data).cast("B"))
        self.position += count
        self.raw.write(data)
        return count

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        if not self.raw.closed:
            self.raw.flush()

    def fileno(self) -> int:
        return self.raw.fileno()


class CheckpointTensors:
    """The tensors of one checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._metadata = FileSystemReader(folder).read_metadata()
        except Exception as error:  # unpickling a damaged file can raise anything
            raise CheckpointError(f"{folder / '.metadata'} cannot be read: {error}.") from error

    @property
    def names(self) -> list[str]:
        """Every entry, such as weights/final_norm.weight."""
        return sorted(self._metadata.state_dict_metadata)

    @property
    def parameters(self) -> list[str]:
        """Canonical names of the weights."""
        return [name.partition("/")[2] for name in self.names if name.startswith("weights/")]

    @property
    def optimizer_keys(self) -> list[str]:
        """Kinds of optimizer state that were saved: exp_avg, exp_avg_sq for AdamW."""
        return sorted({name.partition("/")[0] for name in self.names} - {"weights"})

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole shape of an entry."""
        return tuple(self._entry(name).size)

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
        wanted = defaultdict(list)  # stored rectangle -> [(slices of it, slices of a chunk, chunk)]
        for chunk in chunks:
            for item in self._read_items(chunk):
                stored = self._metadata.storage_data[item.storage_index]
                key = (stored.relative_path, stored.offset, stored.length)
                wanted[key].append(
                    (item.storage_offsets, item.dest_offsets, item.lengths, chunk.data)
                )

        def read(place: tuple[str, int, int]) -> None:
            path, offset, length = place
            with open(self.folder / path, "rb", buffering=0) as stream:
                stream.seek(offset)
                data = stream.read(length)
                if len(data) != length:
                    raise CheckpointError(f"{self.folder / path} is truncated.")
            stored = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            for source, target, lengths, destination in wanted[place]:
                destination[_slices(target, lengths)].copy_(stored[_slices(source, lengths)])

        with torch.no_grad(), ThreadPoolExecutor(num_threads) as pool:
            for _ in pool.map(read, sorted(wanted)):
                pass

    def _entry(self, name: str) -> Any:
        if name not in self._metadata.state_dict_metadata:
            raise CheckpointError(
                f"{self.folder} has no {name}. It was written by a model with other parameters; "
                f"compare `python -m pipeline.checkpoint show {self.folder}`."
            )
        return self._metadata.state_dict_metadata[name]

    def _read_items(self, chunk: Chunk) -> list[Any]:
        entry = self._entry(chunk.name)
        if tuple(entry.size) != chunk.whole_shape:
            raise CheckpointError(
                f"{chunk.name} is {tuple(entry.size)} in {self.folder} and {chunk.whole_shape} in "
                "this model. Both must have the same sizes; "
                "see config.model in its checkpoint.json."
            )
        here = ChunkStorageMetadata(torch.Size(chunk.offsets), chunk.data.size())
        items = create_read_items_for_chunk_list(chunk.name, entry, [here])
        if sum(math.prod(item.lengths) for item in items) != chunk.data.numel():
            raise CheckpointError(f"{chunk.name} is not stored in full in {self.folder}.")
        return items


def _slices(offsets: Iterable[int], lengths: Iterable[int]) -> tuple[slice, ...]:
    return tuple(
        slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True)
    )
