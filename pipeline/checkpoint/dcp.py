"""Checkpoints of version 1, whose index is a pickle of torch DCP: read without running any of it.

A pickle names the functions it calls. A real `.metadata` names the dozen below; any other name is
refused before anything happens.
"""

from __future__ import annotations

import io
import math
import pathlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.serialization import _get_layout

from pipeline.checkpoint.folder import METADATA
from pipeline.errors import CheckpointError
from pipeline.files import open_regular, read_file, regular_file

_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", name): getattr(metadata, name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("torch", "Size"): torch.Size,
    ("torch", "float32"): torch.float32,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,  # opens nothing
    ("pathlib", "PurePosixPath"): pathlib.PurePosixPath,
}
Stored = dict[str, tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...], Any]]]]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise CheckpointError(f"it names {module}.{name}, which no checkpoint needs")
        return _ALLOWED[module, name]


def open_version_1(folder: Path) -> tuple[Stored, Callable[[Any], Tensor]]:
    """(name -> (shape, [(offsets, sizes, place)]), reader of a place) of a version 1 checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or names what no checkpoint needs.
    """
    path = folder / METADATA
    try:
        content = _Unpickler(io.BytesIO(read_file(path, inside=folder))).load()
        stored: Stored = {}
        for name, entry in content.state_dict_metadata.items():
            parts = []
            for chunk in entry.chunks:
                info = content.storage_data[metadata.MetadataIndex(name, chunk.offsets)]
                if "/" in info.relative_path or not info.relative_path.endswith(".distcp"):
                    raise CheckpointError(f"it names the file {info.relative_path}")
                if 4 * math.prod(chunk.sizes) > info.length:
                    raise CheckpointError(f"{name} is larger than what is stored of it")
                place = (info.relative_path, int(info.offset), int(info.length))
                parts.append((tuple(chunk.offsets), tuple(chunk.sizes), place))
            stored[name] = (tuple(entry.size), parts)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} cannot be read: {error}.") from None

    def load(place: tuple[str, int, int]) -> Tensor:
        name, offset, length = place
        try:
            with open_regular(regular_file(folder / name)) as stream:
                stream.seek(offset)
                data = stream.read(length)
            if len(data) != length:
                raise ValueError(f"it ends before byte {offset + length}")
            loaded: Tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            if not isinstance(loaded, Tensor) or loaded.dtype is not torch.float32:
                raise ValueError(f"byte {offset} begins no fp32 tensor")
        except Exception as error:  # a damaged pickle can raise anything
            raise CheckpointError(f"{folder / name} cannot be read: {error}.") from None
        return loaded

    return stored, load
