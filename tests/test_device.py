"""Tests for a device can use it, and no other test sees it."""

from __future__ import annotations

import os

import pytest

from tests.support import device
from tests.support.device import run_on_device


def visible() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def fail() -> None:
    raise ValueError("no kernel image")


def test_only_processes_for_a_device_see_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU test must not change with the machine; a device test must not be forked from one that hides it."""
    assert visible() == ""
    monkeypatch.setitem(device._before, "CUDA_VISIBLE_DEVICES", "3")
    assert run_on_device(visible) == "3"
    assert visible() == ""


def test_what_a_device_process_raises_is_the_message() -> None:
    with pytest.raises(AssertionError, match="fail raised:(.|\\n)*ValueError: no kernel image"):
        run_on_device(fail)
