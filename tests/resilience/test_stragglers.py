"""A rank is slow when it stays slow; then every rank names it."""

import torch

from pipeline.distributed.ranks import RankHost
from pipeline.resilience.stragglers import Stragglers
from tests.support.ranks import run_on_ranks

RANKS = [RankHost(rank, f"n{rank + 1}", 0, 0.0) for rank in range(4)]


def _reports() -> list[list[int]]:
    rank = torch.distributed.get_rank()
    stragglers = Stragglers(ratio=1.3, device=torch.device("cpu"))
    return [stragglers.report(data_wait_ms=500.0 * (rank == 1)).stragglers for _ in range(3)]


def test_persistent_slowness_names_the_rank_on_every_rank():
    assert run_on_ranks(_reports, 2) == [[[], [], [1]]] * 2


def test_one_slow_report_is_not_a_straggler():
    stragglers = Stragglers(ratio=1.3, device=torch.device("cpu"))
    series = [[5, 5, 9, 5], [5, 5, 9, 5], [5, 5, 5, 5], [5, 5, 9, 5], [5, 5, 9, 5], [5, 5, 9, 5]]
    reports = [stragglers.find_stragglers([float(t) for t in times]) for times in series]
    assert [r.stragglers for r in reports] == [[], [], [], [], [], [2]]
    assert reports[-1].warning(RANKS).startswith("rank 2 on n3: 1.8 times slower")
    assert reports[0].metrics()["resilience/slowest_rank"] == 2.0
