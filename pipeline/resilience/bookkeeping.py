"""What only tells of a run never ends it: a failure is one warning and a count, and is tried again.

    with bookkeeping("metrics.jsonl"):    an OSError of the block ends here: a full or read-only
        ...                               disk, a folder that is gone, a closed terminal

Whoever writes again later catches up by itself, for its next try writes what is missing: rows that
wait (tracking/row_file.py), or a state that replaces the one before. What a run cannot do without,
its data and its checkpoints, does not come here.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from pipeline.log import logger

_failures: Counter[str] = Counter()  # by what: all of this process
_in_a_row: Counter[str] = Counter()  # by what: since the last time that it went well


@contextlib.contextmanager
def bookkeeping(what: str, *, errors: type[Exception] = OSError) -> Iterator[None]:
    """A block that writes or tells something; whatever `errors` it meets, the run goes on.

    Args:
        what: names it in the one warning; the next comes after it has gone well in between.
        errors: what may go wrong; a library with errors of its own needs more than OSError.
    """
    try:
        yield
    except errors as error:
        _failures[what] += 1
        _in_a_row[what] += 1
        if _in_a_row[what] == 1:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            logger.warning("%s: %s; the run goes on, and it is tried again", what, reason)
    else:
        if tries := _in_a_row.pop(what, 0):
            logger.info("%s: well again, after %d failures", what, tries)


def num_failures() -> int:
    """Failures of this process so far; resilience/bookkeeping_failures in metrics.jsonl."""
    return _failures.total()
