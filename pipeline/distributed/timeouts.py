"""How long ranks wait for one another: half an hour at the start, less once a step is done."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist


def step_timeout_s(*, hang_timeout_s: float, collective_timeout_s: float) -> float:
    """Seconds that a collective may take once a step is done.

    The start has kernels to compile and ranks that begin minutes apart. A step has neither: half as
    long again as the watchdog waits, so that its page comes first, and a rank whose interpreter is
    stuck, which can write none, is still not waited for half an hour.
    """
    if not hang_timeout_s:
        return collective_timeout_s
    return min(collective_timeout_s, 1.5 * hang_timeout_s)


def shorten_timeouts(timeout_s: float, *, but: dist.ProcessGroup) -> None:
    """Let every group of this process but one give up after `timeout_s`.

    Args:
        but: the group of the host, in which ranks wait for a checkpoint to be written.
    """
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        if group is not but:
            distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
