"""A checkpoint is read while its files' sums are made, and what a damaged one gave is void."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.agreement import Agreement
from pipeline.errors import CheckpointError
from tests.support.waiting import HANG_S


class OneRank(Agreement):
    """An agreement of this process with itself."""

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


def test_a_checkpoint_is_read_while_it_is_checked(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SHA-256 takes most of a load: it waits for the reading to begin, or this test hangs."""
    reading, sha256_of = threading.Event(), folders.sha256_of

    def slow(path: Path) -> str:
        assert not folders.holds_tensors(path.name) or reading.wait(HANG_S)
        return sha256_of(path)

    monkeypatch.setattr(folders, "sha256_of", slow)
    found = OneRank().read_checked(small / folders.name_of(2), lambda: reading.set() or "read")
    assert found == ([], "read")
    with pytest.raises(CheckpointError, match="another model"):
        OneRank().read_checked(small / folders.name_of(2), lambda: refuse("another model"))


def refuse(text: str) -> None:
    raise CheckpointError(text)


def test_what_a_damaged_checkpoint_gave_or_raised_is_void(small: Path, tmp_path: Path) -> None:
    """Damage that cannot be read is damage, not another model; damaged small files are not read."""
    copy = shutil.copytree(small / folders.name_of(2), tmp_path / "copy")
    tensors = copy / "rank-00001.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    for read in (lambda: "read", lambda: refuse("another model")):
        problems, value = OneRank().read_checked(copy, read)
        assert [p.partition(":")[0] for p in problems] == [tensors.name] and value is None
    (copy / "tensors.json").write_bytes(b"{}")
    problems, _ = OneRank().read_checked(copy, lambda: pytest.fail("it was read"))
    assert [p.partition(":")[0] for p in problems] == ["tensors.json"]
