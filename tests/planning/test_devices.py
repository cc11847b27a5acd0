"""Devices as files: those that come along, one's own, and what is wrong with one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.planning.devices import FOLDER, device_of, known_devices, load_device


@pytest.mark.parametrize("name", known_devices())
def test_a_device_that_comes_along_loads(name):
    """Its peak is flops.py's: one table says it."""
    device = load_device(name)
    assert device.peak > 1e14 and 0 < device.attention_share < device.matrix_share < 1


def test_the_promised_devices_are_there():
    assert {"h100", "h200", "a100", "b200", "mi300x"} <= set(known_devices())


def test_a_device_of_ones_own_is_a_path(tmp_path):
    text = (FOLDER / "h100.yaml").read_text().replace("NVIDIA H100 80GB HBM3", "Ours 1")
    path = tmp_path / "ours.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="'Ours 1' is not in flops.py's table: set peak_tflops"):
        load_device(str(path))
    path.write_text(text + "peak_tflops: 500\n")
    device = load_device(str(path))
    assert (device.name, device.peak) == ("ours", 5e14)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("watts: 700", "", "watts is missing"),
        ("watts: 700", "watts: 700\nwats: 1", "wats is not known"),
        ("watts: 700", "watts: -1", r"watts \(-1\) must be a number above 0"),
        ("watts: 700", "watts: [", "is not yaml"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path, before, after, message):
    path = tmp_path / "ours.yaml"
    path.write_text((FOLDER / "h100.yaml").read_text().replace(before, after))
    with pytest.raises(ConfigError, match=message) as caught:
        load_device(str(path))
    assert str(path) in str(caught.value)


def test_an_unknown_device_is_told_the_known_ones():
    with pytest.raises(ConfigError, match="Known: a100, a100-40g, b200, h100"):
        load_device("h1000")


@pytest.mark.parametrize(
    ("torch_name", "gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", None, "h100"),
        ("NVIDIA H200", None, "h200"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40g"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-40g"),  # was a100: 80 GB, the same peak
        ("NVIDIA A100-PCIE-40GB", None, None),
        ("NVIDIA A100-SXM-80GB", 79.2, "a100"),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 39.5, None),
        ("NVIDIA GH200 480GB", 94.5, None),  # these were others of the same peak
        ("NVIDIA H800", 79.1, None),
        ("AMD Instinct MI325X", 255.9, None),
        ("Intel Xeon", 79.1, None),
    ],
)
def test_the_device_under_a_run_is_found_by_torchs_name_and_its_memory(torch_name, gib, name):
    found = device_of(torch_name, gib and int(gib * 2**30))
    assert (found.name if found else None) == name


def bomb() -> str:
    """A kilobyte of yaml whose text would have 10^20 characters."""
    rows = ["a0: &a0 [xxxxxxxxxx]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 20)]
    return "\n".join([*rows, "memory_gib: *a19", "torch_name: *a19", "? [*a19]\n: 1"])


@pytest.mark.parametrize("content", [bomb(), "[" * 30_000, b"\xff", "x: 1\n" * 50_000, None])
def test_a_strangers_device_costs_a_message(tmp_path: Path, content: str | bytes | None) -> None:
    """It waited for a pipe for ever, ended in tracebacks, or took all memory to say what is wrong."""
    path = tmp_path / "a.yaml"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load_device(str(path))
    assert "a.yaml" in str(caught.value) and len(str(caught.value)) < 5000
