"""A tracker behind a queue, on a thread of its own: slow, gone or wrong, it costs no step.

    rows --queue--> what the mark does not name --mark, then library--> Tracker
              <-- put back, and the library opened again, when it fails

The mark, a small file, says up to which step each series was told, through all starts of a run. A
restart repeats steps, and none of their points is drawn twice; what the library missed because it
was down when the process ended is told from metrics.jsonl by the next start.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import orjson

from pipeline.files import parse_json, read_file, whole_file
from pipeline.log import logger
from pipeline.resilience.bookkeeping import bookkeeping
from pipeline.shapes import COUNT, misfits
from pipeline.tracking.samples import Sample
from pipeline.tracking.tracker import At, Row, Tracker

CLOSE_TIMEOUT_S = 60.0  # what a run waits at its end for a tracker to take the last values
MOST_WAITING = 10_000  # items kept for a tracker that does not take them; later ones are left out
PAUSE_S, LONGEST_PAUSE_S = 30.0, 3600.0  # before a tracker is tried again; doubles
SAMPLES = "samples"
"""What the mark calls the texts of a step, beside the series."""


class Feed:
    """Tells one tracker, in order. Public methods never wait, but for `close`."""

    def __init__(self, tracker: Tracker) -> None:
        """Nothing is told before `begin`."""
        self._tracker = tracker
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue()
        self._closing = threading.Event()
        self._end: Callable[[], None] | None = None
        self._after: At | None = None  # until the library has been opened there
        self._told: dict[str, int] | None = None  # series to its newest step; None: not read yet
        self._thread = threading.Thread(target=self._work, daemon=True, name=tracker.name)

    def begin(self, at: At, past: Sequence[Row]) -> None:
        """The run goes on here.

        Args:
            at: the step, and its tokens.
            past: what metrics.jsonl has up to it, ascending.
        """
        self._after = at
        self._put(partial(self._resume, at, past))
        self._thread.start()

    def log(self, row: Row) -> None:
        """Hand over values."""
        self._put(partial(self._log, row))

    def log_samples(self, at: At, samples: Sequence[Sample]) -> None:
        """Hand over texts."""
        tell = partial(self._tracker.log_samples, at, samples)
        self._put(partial(self._tell_once, at, [SAMPLES], tell))

    def summarize(self, at: At, values: Mapping[str, float | None]) -> None:
        """Hand over what is said of the whole run."""
        self._put(partial(self._tracker.summarize, at, values))

    def rewind(self, at: At) -> None:
        """The run is back here and does the steps behind it anew, on other samples."""
        self._put(partial(self._rewind, at))

    def close(self, exit_code: int) -> None:
        """Let the library end with the exit code; waits CLOSE_TIMEOUT_S at most."""
        if self._thread.ident is None:
            return  # it never began
        self._end = partial(self._tracker.close, exit_code)
        self._queue.put(self._end)
        self._closing.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        if waiting := self._queue.qsize() or self._thread.is_alive():
            logger.warning(
                "%s did not take the last %d values within %.0f s; metrics.jsonl has everything, "
                "and the next start of this run tells it",
                self._tracker.name,
                waiting,
                CLOSE_TIMEOUT_S,
            )

    def _put(self, item: Callable[[], None]) -> None:
        with bookkeeping(f"the queue of {self._tracker.name}", errors=queue.Full):
            if self._queue.qsize() >= MOST_WAITING:
                raise queue.Full(f"{MOST_WAITING} values wait; later ones are left out")
            self._queue.put(item)

    # ---- on the thread ---------------------------------------------------------------------------

    def _work(self) -> None:
        """Open the library and tell it what the queue brings, again after every failure."""
        pause_s, is_done = PAUSE_S, False
        while not is_done:
            # At the end there is time for one try: not for the one that the end came upon.
            is_last = self._closing.is_set()
            what = f"{self._tracker.name}, while metrics.jsonl has everything"
            with bookkeeping(what, errors=Exception):
                self._tracker.open(self._after)
                self._after = None
                self._tell()
                is_last = True
            is_done = is_last
            if not is_done:
                self._closing.wait(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _tell(self) -> None:
        """Work off the queue, to its last item, which closes the library."""
        item = None
        while item is None or item is not self._end:
            item = self._queue.get()
            try:
                item()
            except Exception:
                with self._queue.mutex:  # it comes first when the library is back
                    self._queue.queue.appendleft(item)
                raise

    def _resume(self, at: At, past: Sequence[Row]) -> None:
        """Tell what earlier starts did not; may be done again from its beginning."""
        if self._told is None:
            told = self._read_mark()
            if told is None:
                told = {key: row.at.step for row in past for key in row.values}
            self._told = self._up_to(at, told)
        for row in past:
            self._log(row)

    def _log(self, row: Row) -> None:
        told = self._told or {}
        new = {key: value for key, value in row.values.items() if row.at.step > told.get(key, -1)}
        if new:
            self._tell_once(row.at, list(new), partial(self._tracker.log, row.at, new))

    def _tell_once(self, at: At, keys: Sequence[str], tell: Callable[[], None]) -> None:
        """Tell it unless it was told: a point is rather missing after a kill than there twice."""
        told = self._told or {}
        if all(at.step <= told.get(key, -1) for key in keys):
            return
        new = told | dict.fromkeys(keys, at.step)
        # First the mark: a kill comes at any moment. Where it cannot be written nothing is told.
        self._write_mark(new)
        try:
            tell()
        except Exception:
            with contextlib.suppress(OSError):
                self._write_mark(told)
            raise
        self._told = new

    def _write_mark(self, told: dict[str, int]) -> None:
        # Not synced: a power cut may cost a mark, and no step waits for it.
        with whole_file(self._tracker.mark, durable=False) as file:
            file.write(orjson.dumps(told))

    def _rewind(self, at: At) -> None:
        """Hide what was drawn behind `at`, where the library can; else the first points stay."""
        if self._tracker.takes_back:
            self._tracker.open(at)
            self._told = self._up_to(at, self._told or {})

    def _up_to(self, at: At, told: Mapping[str, int]) -> dict[str, int]:
        """What of it is still told when the run is back at `at`."""
        if not self._tracker.takes_back:
            return dict(told)
        return {key: min(step, at.step) for key, step in told.items()}

    def _read_mark(self) -> dict[str, int] | None:
        """What earlier starts told, by series; None: nobody knows, so it may be everything."""
        mark = self._tracker.mark
        try:
            told = parse_json(read_file(mark))
        except FileNotFoundError:
            return None if self._tracker.is_known() else {}
        except ValueError as error:
            told = str(error)
        if wrong := next(misfits(told, {str: COUNT}), None):
            logger.warning("%s is no mark (%s): what this run told is not told again", mark, wrong)
            return None
        return told
