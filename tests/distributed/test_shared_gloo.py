"""All gloo groups of a process share one transport."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.ranks import run_on_ranks


def transports_of_many_groups() -> tuple[int, float]:
    from pipeline.distributed import shared_gloo

    shared_gloo.share_transport()
    before = threads()
    groups = [dist.new_group([0, 1]) for _ in range(5)]
    value = torch.ones(())
    for group in groups:
        dist.all_reduce(value, group=group)
    from torch.distributed.distributed_c10d import ProcessGroupGloo

    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    assert isinstance(backends[0], ProcessGroupGloo)  # as torch asks for time limits
    workers = sum(backend.options._threads for backend in backends)
    return threads() - before - workers, float(value)


def threads() -> int:
    # Not by name: torch 2.11's transports have none.
    return len(list(Path("/proc/self/task").iterdir()))


def test_five_groups_start_one_transport_and_reduce() -> None:
    assert run_on_ranks(transports_of_many_groups, 2) == [(1, 32.0), (1, 32.0)]
