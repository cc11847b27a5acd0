"""A rank that waits for a collective that it launched earlier is seen to wait, on a real group."""

from __future__ import annotations

import sys
import threading
import time

import torch
import torch.distributed as dist

from pipeline.distributed.waits import wait_for
from pipeline.resilience.hang_page import doing
from tests.support.ranks import run_on_ranks


def seen_from_beside() -> str:
    """What the watchdog says of rank 0's main thread while rank 1 comes late."""
    store, found = dist.distributed_c10d._get_default_store(), [""]
    main = threading.main_thread().ident
    assert main is not None

    def look() -> None:
        while not found[0]:
            found[0] = doing(sys._current_frames()[main])
            time.sleep(0.01)
        store.set("seen", "yes")

    if dist.get_rank() == 1:
        store.wait(["seen"])
        dist.all_reduce(torch.ones(3))
        return ""
    works = [dist.all_reduce(torch.ones(3), async_op=True)]
    beside = threading.Thread(target=look)
    beside.start()
    wait_for(works)
    beside.join()
    return found[0]


def test_a_rank_that_waits_is_not_taken_for_a_busy_one() -> None:
    assert run_on_ranks(seen_from_beside, 2)[0] == "collective (wait_for)"
