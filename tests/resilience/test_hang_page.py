"""The page of a hang names the right rank, whatever the others saw."""

import pytest

from pipeline.distributed.ranks import RankHost
from pipeline.resilience.hang_page import Sighting, guilty, hang_page

RANKS = [RankHost(rank, f"n{1 + rank // 2}", 100 + rank, 0.0) for rank in range(4)]


def sighting(
    rank, *, beats=40, doing="collective (all_reduce)", phase="train", neighbours=None, waits=()
):
    return Sighting(
        rank,
        beats,
        phase,
        12,
        doing,
        9.0,
        "samples c0ffee",
        neighbours or {},
        list(waits),
        "thread MainThread:\n  ...",
    )


@pytest.mark.parametrize(
    "seen, ranks, why",
    [
        ([sighting(0), sighting(1), sighting(2)], [3], "silent"),
        ([sighting(0), sighting(1), sighting(2, neighbours={"3": "T"})], [3], "stopped by a signal"),
        ([sighting(0), sighting(1), sighting(2, neighbours={"3": "-"})], [3], "dead"),
        ([sighting(0), sighting(1, beats=39, doing="data (read)"), sighting(2), sighting(3)], [1], "behind the others, in"),
        ([sighting(0), sighting(1), sighting(2, doing="forward (f)"), sighting(3)], [2], "in forward (f) while"),
        ([sighting(r) for r in range(4)], [0, 1, 2, 3], "a link between nodes"),
    ],
)  # fmt: skip
def test_guilty_rank_is_named(seen, ranks, why):
    who, reason = guilty(seen, RANKS)
    assert who == ranks
    assert why in reason


def test_page_names_rank_node_step_samples_and_the_way_out():
    page = hang_page([sighting(0), sighting(1), sighting(3)], RANKS, timeout_s=600)
    assert page.startswith("# No progress for 600 s at step 12")
    assert "**rank 2 on n2**: silent" in page and "samples c0ffee" in page
    assert "102 on n2" in page and "ExcNodeList=n2" in page and "thread MainThread" in page


def test_page_of_a_large_job_stays_readable():
    ranks = [RankHost(rank, f"n{rank // 8}", rank, 0.0) for rank in range(4096)]
    page = hang_page([sighting(rank) for rank in range(4096) if rank != 1234], ranks, timeout_s=600)
    assert "rank 1234 on n154" in page and len(page.splitlines()) < 90


def test_the_collectives_of_each_rank_stand_side_by_side():
    """Ranks that went different ways wait in different ones, which no stack shows."""
    seen = [
        sighting(0, waits=["all_reduce number 7 of group 3 data: 40 Float, started"]),
        sighting(1, waits=["all_gather number 2 of group 1 tensor: 8 Float, started"]),
        sighting(2),
    ]
    page = hang_page(seen, RANKS[:3], timeout_s=600)
    assert (
        "| 0 | all_reduce number 7 of group 3 data: 40 Float, started |\n| 1 | all_gather" in page
    )
    assert "Collectives that wait" not in hang_page([sighting(0)], RANKS[:1], timeout_s=600)
