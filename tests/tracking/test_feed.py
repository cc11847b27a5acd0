"""No point twice, none lost while it can be helped: over restarts, a dead library, a full disk."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.resilience.bookkeeping import num_failures
from pipeline.tracking import feed
from pipeline.tracking.feed import Feed
from pipeline.tracking.samples import Sample
from pipeline.tracking.tracker import At, Row
from tests.support.trackers import Memory
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "PAUSE_S", 0.01)
    monkeypatch.setattr(feed, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(feed, "CLOSE_TIMEOUT_S", 5.0)


def row(step: int, value: float = 0.0, key: str = "train/loss") -> Row:
    return Row(At(step, 32 * step, 1000.0 + step), {key: value})


@contextlib.contextmanager
def start(memory: Memory, *past: Row, at: int = 0) -> Iterator[Feed]:
    """One start of the run."""
    made = Feed(memory)
    made.begin(At(at, 32 * at, 0.0), past)
    yield made
    made.close(0)


def steps(memory: Memory, key: str = "train/loss") -> list[int]:
    return [step for step, _ in memory.points[key]]


@pytest.mark.parametrize("takes_back", [False, True])
def test_a_restart_repeats_steps_and_tells_none_of_them_twice(
    tmp_path: Path, takes_back: bool
) -> None:
    """Killed after step 6, back at the checkpoint of step 4."""
    memory = Memory(tmp_path, takes_back=takes_back)
    with start(memory) as run:
        for step in range(1, 7):
            run.log(row(step))
        run.log(row(6, key="val/a/loss"))  # another series of the same step
    with start(memory, *map(row, range(1, 5)), at=4) as run:
        for step in range(5, 9):
            run.log(row(step, 1.0))
    assert steps(memory) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert memory.points["train/loss"][4] == (5, 1.0 if takes_back else 0.0)
    assert memory.exit_code == 0


def test_what_a_dead_library_missed_is_told_by_the_next_start(tmp_path: Path) -> None:
    """It was down when the process ended, so what waited for it in memory is gone."""
    memory, failures = Memory(tmp_path), num_failures()
    with start(memory) as run:
        run.log(row(1))
        wait_until(lambda: memory.points)
        memory.is_down = True
        for step in range(2, 7):
            run.log(row(step))
        wait_until(lambda: num_failures() > failures)
    assert steps(memory) == [1]
    memory.is_down = False
    with start(memory, *map(row, range(1, 5)), at=4) as run:
        for step in range(5, 8):
            run.log(row(step))
    assert steps(memory) == [1, 2, 3, 4, 5, 6, 7]


def test_a_library_that_comes_back_gets_all_in_order(tmp_path: Path) -> None:
    """Within one process nothing is lost: neither rows, nor texts, nor the summary."""
    memory = Memory(tmp_path)
    memory.is_down = True
    with start(memory) as run:
        for step in range(1, 4):
            run.log(row(step))
        run.log_samples(At(3, 96, 0.0), [Sample("a", "b")])
        run.summarize(At(3, 96, 0.0), {"best/loss": 1.0})
        memory.is_down = False
    assert steps(memory) == [1, 2, 3]
    assert (memory.samples, memory.summary) == ([(3, [Sample("a", "b")])], {"best/loss": 1.0})


@pytest.mark.parametrize("takes_back", [False, True])
def test_steps_that_are_rolled_back_stand_once(tmp_path: Path, takes_back: bool) -> None:
    """Other samples, other losses: the later are shown where the library can, else the first stay."""
    memory = Memory(tmp_path, takes_back=takes_back)
    with start(memory) as run:
        for step in range(1, 6):
            run.log(row(step))
        run.rewind(At(2, 64, 0.0))
        for step in range(3, 7):
            run.log(row(step, 1.0))
    later = [1.0, 1.0, 1.0] if takes_back else [0.0, 0.0, 0.0]
    assert memory.points["train/loss"] == [*enumerate([0.0, 0.0, *later, 1.0], start=1)]


def test_where_the_mark_cannot_be_written_nothing_is_told_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: told without a mark, a kill and a restart would draw everything twice."""
    memory, failures, tries = Memory(tmp_path), num_failures(), []
    write = feed.whole_file

    def full(path: Path, **options: object):
        tries.append(path)
        if len(tries) < 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, **options)

    monkeypatch.setattr(feed, "whole_file", full)
    with start(memory) as run:
        for step in range(1, 4):
            run.log(row(step))
        wait_until(lambda: memory.points)
    assert steps(memory) == [1, 2, 3] and len(tries) == 6
    assert num_failures() == failures + 3
    assert json.loads(memory.mark.read_text()) == {"train/loss": 3}


def test_a_run_that_left_no_mark_or_a_damaged_one_is_not_told_again(tmp_path: Path, caplog) -> None:
    """A run of an older program: all of its past is in W&B; none of it must come twice."""
    past = [row(1), row(2)]
    for content in (None, b"{", b'{"train/loss": -1}'):
        memory = Memory(tmp_path)
        memory.known = True
        memory.mark.parent.mkdir(exist_ok=True)
        memory.mark.unlink(missing_ok=True)
        if content is not None:
            memory.mark.write_bytes(content)
        with start(memory, *past, at=2) as run:
            run.log(row(3))
        assert steps(memory) == [3], content
    assert caplog.text.count("is no mark") == 2
    fresh = Memory(tmp_path / "fresh")  # a tracker that is turned on in the middle of a run
    with start(fresh, *past, at=2) as run:
        run.log(row(3))
    assert steps(fresh) == [1, 2, 3]


def test_a_feed_that_never_began_ends_at_once(tmp_path: Path) -> None:
    """A start may fail before its first step."""
    memory = Memory(tmp_path)
    Feed(memory).close(2)
    assert memory.opened == 0 and memory.exit_code == -1
