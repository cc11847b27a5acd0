"""For tests/engine/test_changes_are_needed.py: a run of pytest without one of our changes."""

from __future__ import annotations

import os

from pipeline import patching

VARIABLE = "LEFT_OUT_CHANGE"


def leave_out() -> None:
    """Undo the change that the environment names, in this process."""
    if key := os.environ.get(VARIABLE):
        patching.leave_out(key)
