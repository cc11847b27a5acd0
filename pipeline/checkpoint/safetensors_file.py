"""A safetensors file written as its tensors come, one at a time.

    header length (u64, little-endian) | JSON: name -> dtype, shape, data_offsets | tensors' bytes

By hand, because safetensors' own writer wants all tensors of a file in memory at once, as bytes.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.files import own_name

# torch's name -> safetensors' name
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], values: Iterable[Tensor], dtype: torch.dtype
) -> tuple[int, str]:
    """(bytes of tensor data, sha256 of the whole file), which is on the disk when this returns.

    Args:
        path: the file.
        shapes: name to shape, in the order in which `values` come.
        values: converted to `dtype` one by one.
        dtype: of the written tensors.

    Raises:
        OSError: the disk is full, or did not take every byte.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    digest, written = hashlib.sha256(), 0
    with open(path, "wb", buffering=0, opener=own_name) as stream:

        def put(data: Any) -> None:
            nonlocal written
            digest.update(data)
            view = memoryview(data)
            while view:  # an unbuffered write may take only a part
                count = stream.write(view)
                written, view = written + count, view[count:]

        put(struct.pack("<Q", len(text)) + text)
        for value in values:
            data = value.to(device="cpu", dtype=dtype).contiguous().view(-1)
            if data.numel():
                put(data.view(torch.uint8).numpy().data)
        os.fsync(stream.fileno())
    if (found := os.stat(path).st_size) != written or written != 8 + len(text) + end:
        raise OSError(f"{path} has {found} bytes, {8 + len(text) + end} belong in it")
    return end, digest.hexdigest()
