"""pipeline.checkpoint.safetensors_file: the safetensors library reads what it writes."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoint.safetensors_file import write_safetensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_reads_every_tensor_and_the_sum_is_the_files(tmp_path, dtype):
    values = {"a": torch.randn(3, 5), "empty": torch.zeros(0, 4), "b": torch.randn(7).double()[::2]}
    path = tmp_path / "x.safetensors"
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    size, digest = write_safetensors(path, shapes, iter(values.values()), dtype)
    found = load_file(path)
    assert list(found) == sorted(values) or set(found) == set(values)
    for name, value in values.items():
        assert torch.equal(found[name], value.to(dtype)), name
    assert size == sum(v.numel() for v in values.values()) * dtype.itemsize
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_value_that_does_not_fit_its_shape_is_found(tmp_path):
    with pytest.raises(OSError, match="belong in it"):
        write_safetensors(tmp_path / "x", {"a": (4,)}, [torch.zeros(3)], torch.float32)
