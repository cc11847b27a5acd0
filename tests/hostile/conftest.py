"""What the tests of hostile folders share: a file that none may touch, and no time for the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hostile import snapshot


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes most of the time of thousands of small folders, and shows nothing here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """The file; all around it must stay as it is."""
    folder = tmp_path / "outside"
    folder.mkdir()
    file = folder / "precious.json"
    file.write_text('{"secret": 1}')
    before = snapshot(folder)
    yield file
    assert snapshot(folder) == before, "something was written, or run, outside of the folder"
