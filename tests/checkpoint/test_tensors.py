"""pipeline.checkpoint.tensors: an index that lies is refused, and the format is what its page says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.checkpoint import tensors
from pipeline.checkpoint.agreement import Agreement
from pipeline.checkpoint.tensors import CheckpointTensors, pinned_blocks, write
from pipeline.errors import CheckpointError
from pipeline.model.fragments import Chunk
from tests.support.ranks import run_on_ranks

WHOLE = torch.arange(12.0 * 10).reshape(12, 10)
# As TP and ZeRO cut it: rectangles of different widths, one rank with two, one with none.
CUTS = [[(0, 0, 5, 10)], [(5, 0, 7, 4), (5, 4, 3, 6)], [(8, 4, 4, 6)], []]


def write_cuts(folder: Path, file_bytes: int = 1 << 30) -> dict[str, str]:
    tensors.FILE_BYTES = file_bytes
    folder.mkdir(exist_ok=True)
    chunks = [
        Chunk(name, (12, 10), (r, c), scale * WHOLE[r : r + n, c : c + m].clone())
        for r, c, n, m in CUTS[dist.get_rank()]
        for name, scale in (("weights/a", 1), ("exp_avg/a", -1))
    ]
    return write(chunks, folder, ranks=Agreement(dist.group.WORLD))


FILES = {1 << 30: [[0], [1], [2], []], 200: [[0, 4], [1, 5], [2], []]}
"""Bytes of a file -> the numbers of each rank's; the first has 400 bytes."""


@pytest.fixture(scope="module", params=FILES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensors")
    sums = run_on_ranks(write_cuts, 4, folder, request.param)
    sums[0].pop("tensors.json")
    names = [[f"rank-{n:05d}.safetensors" for n in numbers] for numbers in FILES[request.param]]
    assert [list(own) for own in sums] == names
    return folder


@given(st.lists(st.integers(1, 3000), max_size=60))
@settings(deadline=None)
def test_pinned_blocks_hold_every_chunk_once(sizes):
    with mock.patch("pipeline.checkpoint.tensors.PINNED_ELEMENTS", 1024):
        blocks = pinned_blocks(sizes)
    parts = sorted(part for _, members in blocks for part in members)
    assert [index for index, _ in parts] == list(range(len(sizes)))
    for room, members in blocks:
        ends = [0] + [start + sizes[index] for index, start in members]
        assert room & (room - 1) == 0 and ends[-1] <= room
        assert [start for _, start in members] == ends[:-1]


def test_pinned_memory_is_little_more_than_the_checkpoint():
    """torch pins powers of two: a chunk of 40 MiB by itself takes 64, a third of a machine's memory for nothing."""
    chunks = [10 * 2**20] * 2000  # of 4 bytes: 78 GiB
    pinned = sum(room for room, _ in pinned_blocks(chunks))
    assert sum(chunks) <= pinned < 1.05 * sum(chunks)
    assert sum(1 << (n - 1).bit_length() for n in chunks) == 1.6 * sum(chunks)  # one by one


def test_what_was_written_comes_back(written):
    tensors = CheckpointTensors(written)
    assert tensors.names == ["exp_avg/a", "weights/a"]
    assert (tensors.parameters, tensors.optimizer_keys) == (["a"], ["exp_avg"])
    assert torch.equal(tensors.tensor("weights/a"), WHOLE)
    assert torch.equal(tensors.tensor("exp_avg/a"), -WHOLE)


@given(
    place=st.tuples(st.integers(0, 11), st.integers(0, 9)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 10)),
)
@settings(deadline=None, max_examples=60)
def test_any_rectangle_of_any_reader_is_the_same_part_of_the_whole(written, place, size):
    part = WHOLE[place[0] : place[0] + size[0], place[1] : place[1] + size[1]]
    data = torch.full_like(part, float("nan"))
    CheckpointTensors(written).read_into([Chunk("weights/a", (12, 10), place, data)])
    assert torch.equal(data, part)


def test_the_format_is_readable_with_json_and_safetensors_alone(written):
    """docs/checkpoints.md says how; a person with neither torch DCP nor this program can do it."""
    from safetensors.numpy import load_file

    index = json.loads((written / "tensors.json").read_text())
    whole = torch.zeros(index["tensors"]["weights/a"]["shape"])
    for rank, offsets, sizes in index["tensors"]["weights/a"]["rectangles"]:
        part = load_file(written / f"rank-{rank:05d}.safetensors")
        key = f"weights/a@{','.join(map(str, offsets))}"
        place = tuple(slice(o, o + n) for o, n in zip(offsets, sizes))
        whole[place] = torch.from_numpy(part[key])
    assert torch.equal(whole, WHOLE)


def edited(written: Path, folder: Path, **changes: Any) -> CheckpointTensors:
    """The checkpoint with another index."""
    shutil.copytree(written, folder, dirs_exist_ok=True)
    index = json.loads((folder / "tensors.json").read_text())
    entry = {key: changes.pop(key) for key in ("shape", "rectangles") if key in changes}
    index["tensors"]["weights/a"] |= entry
    (folder / "tensors.json").write_text(json.dumps(index | changes))
    return CheckpointTensors(folder)


LIES = {
    "format": {"format": "other"},
    "version": {"version": 3},
    "dtype": {"dtype": "BF16"},
    "no tensors": {"tensors": [1]},
    "shape": {"shape": [12, 11]},
    "shape of text": {"shape": "12"},
    "negative": {"shape": [-12, -10]},
    "half": {"shape": [12.0, 10]},
    "a file of that name": {"rectangles": [["../../x", [0, 0], [12, 10]]]},
    "a negative file": {"rectangles": [[-1, [0, 0], [12, 10]]]},
    "hole": {"rectangles": [[0, [0, 0], [5, 10]]]},
    "overlap": {"rectangles": [[0, [0, 0], [6, 10]], [0, [0, 0], [6, 10]]]},
    "over the edge": {"rectangles": [[0, [0, 5], [12, 10]]]},
    "other dimensions": {"rectangles": [[0, [0], [120]]]},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_an_index_that_lies_is_refused_when_it_is_opened(written, tmp_path, lie):
    with pytest.raises(CheckpointError, match="tensors.json"):
        edited(written, tmp_path / "x", **lie)


def test_a_rectangle_of_another_size_than_the_index_says_is_refused(written, tmp_path):
    """torch would stretch a row over the whole part without a word."""
    tensors = edited(written, tmp_path / "x", shape=[5, 20], rectangles=[[0, [0, 0], [5, 20]]])
    with pytest.raises(CheckpointError, match=r"is \(5, 10\), the index says \(5, 20\)"):
        tensors.tensor("weights/a")


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b"[]"])
def test_an_index_that_is_none_is_a_sentence(tmp_path, content):
    (tmp_path / "tensors.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="tensors.json"):
        CheckpointTensors(tmp_path)


def test_a_cut_or_missing_file_is_named(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "x")
    file = folder / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="rank-00000.safetensors.*cannot be read"):
        CheckpointTensors(folder).tensor("weights/a")
    file.unlink()
    with pytest.raises(CheckpointError, match="rank-00000.safetensors.*cannot be read"):
        CheckpointTensors(folder).tensor("weights/a")


def write_overlap(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    chunks = [Chunk("weights/a", (4, 4), (dist.get_rank(), 0), torch.zeros(2, 4))]
    with pytest.raises(CheckpointError) as caught:
        write(chunks, folder, ranks=Agreement(dist.group.WORLD))
    return str(caught.value)


def test_parts_that_overlap_fail_the_save_on_every_rank(tmp_path):
    """Two ranks that both think a row is theirs: one of them is wrong."""
    for message in run_on_ranks(write_overlap, 2, tmp_path / "x"):
        assert "parts of two ranks overlap" in message
