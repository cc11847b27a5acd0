"""A failure of what only tells of a run: one warning, a count, and silence until it is well again."""

import errno
import logging

import pytest

from pipeline.log import logger
from pipeline.resilience import bookkeeping as books
from pipeline.resilience.bookkeeping import bookkeeping, num_failures


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    books._failures.clear()
    books._in_a_row.clear()


def fail(what="the page", error=None):
    with bookkeeping(what):
        raise error or OSError(errno.ENOSPC, "No space left on device")


def test_failures_are_counted_and_said_once_until_it_is_well_again(caplog):
    with caplog.at_level(logging.INFO, logger="pretrain"):
        for _ in range(3):
            fail()
        fail("another")
        with bookkeeping("the page"):
            pass
        fail()
    assert num_failures() == 5
    assert [record.getMessage() for record in caplog.records] == [
        "the page: No space left on device; the run goes on, and it is tried again",
        "another: No space left on device; the run goes on, and it is tried again",
        "the page: well again, after 3 failures",
        "the page: No space left on device; the run goes on, and it is tried again",
    ]


def test_a_bug_is_not_bookkeeping():
    """Only what a disk or a terminal does to us is passed over."""
    with pytest.raises(KeyError), bookkeeping("the page"):
        raise KeyError("step")
    assert num_failures() == 0
