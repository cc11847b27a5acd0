"""How long a rank waits for others once a step is done; that groups obey: training/test_watched_engine.py."""

from __future__ import annotations

import pytest

from pipeline.distributed.timeouts import step_timeout_s


@pytest.mark.parametrize(
    "hang, start, step", [(600, 1800, 900), (0, 1800, 1800), (3600, 1800, 1800), (10, 60, 15)]
)
def test_the_watchdog_is_first_and_the_start_is_never_shorter(
    hang: float, start: float, step: float
) -> None:
    """NCCL ends a process without a page."""
    assert step_timeout_s(hang_timeout_s=hang, collective_timeout_s=start) == step
