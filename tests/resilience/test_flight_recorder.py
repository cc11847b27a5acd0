"""What a rank waits in is told by torch's own recorder, on a real group that waits, and as NCCL writes it."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from pipeline.resilience.flight_recorder import unfinished, waiting_collectives
from tests.support.ranks import run_on_ranks
from tests.support.waiting import HANG_S

# Of _dump_nccl_trace_json (torch 2.13), shortened to the keys that are read.
NCCL = {
    "entries": [
        {
            "process_group": ["3", "data"], "collective_seq_id": 6, "p2p_seq_id": 0, "is_p2p": False,
            "profiling_name": "nccl:all_reduce", "input_sizes": [[40]], "input_dtypes": ["Float"],
            "state": "completed", "retired": True,
        },
        {
            "process_group": ["3", "data"], "collective_seq_id": 7, "p2p_seq_id": 0, "is_p2p": False,
            "profiling_name": "nccl:all_reduce", "input_sizes": [[40, 2], [3]], "input_dtypes": ["Float", "Float"],
            "state": "started", "retired": False,
        },
        {
            "process_group": ["4", "pipe"], "collective_seq_id": 0, "p2p_seq_id": 9, "is_p2p": True,
            "profiling_name": "nccl:recv 0<-1", "input_sizes": [[8, 4]], "input_dtypes": ["BFloat16"],
            "state": "scheduled", "retired": False,
        },
    ]
}  # fmt: skip


def test_what_is_done_is_left_out_and_the_rest_is_said_in_words() -> None:
    assert unfinished(NCCL) == [
        "all_reduce number 7 of group 3 data: 40x2, 3 Float, started",
        "recv 0<-1 number 9 of group 4 pipe: 8x4 BFloat16, scheduled",
    ]
    assert unfinished({}) == []


def wait_for_the_other(started: float) -> list[str]:
    """What rank 0 waits in while rank 1 comes late to its second collective."""
    dist.all_reduce(torch.ones(3))
    while waiting_collectives():  # gloo marks a collective as done just after it wakes who waits
        time.sleep(0.01)
    found: list[str] = []
    if dist.get_rank() == 0:
        work = dist.all_reduce(torch.ones(5, 2), async_op=True)
        found = waiting_collectives()
        dist.distributed_c10d._get_default_store().set("seen", "yes")
        work.wait()
    else:
        dist.distributed_c10d._get_default_store().wait(["seen"])
        dist.all_reduce(torch.ones(5, 2))
    return found


def test_a_rank_that_waits_says_for_what() -> None:
    found = run_on_ranks(wait_for_the_other, 2, time.monotonic(), timeout_s=HANG_S)[0]
    assert len(found) == 1 and found[0].startswith("all_reduce number 2 of group 0")
    assert "5x2 Float" in found[0]
