"""A bad device, link or clock is named with its node."""

import os
import time

import torch

from pipeline.distributed.ranks import RankHost
from pipeline.errors import MachineError
from pipeline.resilience import node_check
from pipeline.resilience.node_check import Finding, find_bad_ranks
from tests.support.ranks import run_on_ranks

RANKS = [RankHost(rank, f"n{rank + 1}", 0, 0.0) for rank in range(4)]
GOOD = Finding(True, 2.0, True, 1.0, True, 1000.0)


def test_bad_nodes_are_named_and_slow_ones_are_mentioned():
    findings = [
        Finding(True, 2.0, True, 30.0, True, 1000.0),
        Finding(False, 2.0, True, 1.0, True, 1000.0),
        Finding(True, 2.0, False, 1.0, True, 1000.0),
        Finding(True, 2.0, True, 1.0, True, 1100.0),
    ]
    bad, slow = find_bad_ranks(findings, RANKS)
    assert bad == {
        1: "the device computed a wrong matrix product",
        2: "data from rank 1 on n2 arrived damaged",
        3: "the clock is +100 s off; start chrony or ntpd there",
    }
    assert slow == [
        "node check: rank 0 on n1: link from the rank before took 30.0 ms, median 1.0 ms"
    ]
    assert find_bad_ranks([GOOD] * 4, RANKS) == ({}, [])


def _check(broken: bool) -> list[str]:
    rank = torch.distributed.get_rank()
    if broken and rank == 1:  # a device that gets one bit wrong
        true_mm = torch.mm
        torch.mm = lambda a, b: true_mm(a, b).index_put(
            (torch.tensor([3]), torch.tensor([5])), torch.tensor(1.0)
        )
    fact = RankHost(rank, f"n{rank + 1}", os.getpid(), time.time())
    try:
        return [f.node for f in node_check.check(fact, torch.device("cpu"))]
    except MachineError as error:
        return str(error).splitlines()


def test_check_passes_on_good_ranks_and_raises_on_all_when_one_miscalculates():
    assert run_on_ranks(_check, 2, False) == [["n1", "n2"]] * 2
    expected = [
        "the node check failed:",
        "  rank 1 on n2: the device computed a wrong matrix product",
        "Leave the node out: sbatch --exclude=n2 ...",
    ]
    assert run_on_ranks(_check, 2, True) == [expected] * 2
