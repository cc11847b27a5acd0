"""No run hangs for ever: one page says which rank stands still and where, and the job ends.

    each rank, a thread: Clock.now is old --> logs/.hang-<start>/00003.json, what it was doing
    lowest rank that writes one, after the others --> logs/hang-<step>.md, exit code 4 everywhere

While all goes well nothing is written and nothing is sent. A rank that is stopped, dead, or cut off
writes no page: its silence names it. Who writes is judged by the number of phases it has been
through, then by what its stack shows. Time in which the process itself was not run (SIGSTOP,
`scontrol suspend`, a paused machine) is nobody's lack of progress and is not counted.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from pipeline.distributed.ranks import RankHost, describe_ranks
from pipeline.errors import EXIT_HANG
from pipeline.files import whole_file
from pipeline.log import say
from pipeline.redaction import redact
from pipeline.resilience.clock import Beat, Clock
from pipeline.resilience.flight_recorder import waiting_collectives
from pipeline.resilience.hang_page import (
    Sighting,
    all_stacks,
    doing,
    guilty,
    hang_page,
    process_state,
)

ABSENCE_S = 1.0
"""A tick that comes so much too late says that the process was stopped, or the machine paused."""


class Watchdog:
    """A daemon thread that ends a run which makes no progress; a context manager."""

    def __init__(
        self,
        clock: Clock,
        *,
        run_dir: Path,
        hosts: list[RankHost],
        global_rank: int,
        timeout_s: float,
        describe_step: Callable[[], str],
    ) -> None:
        """Watch `clock`.

        Args:
            clock: beaten by the trainer.
            run_dir: the page goes to its logs/.
            hosts: where all ranks live, from gather_hosts.
            global_rank: this rank.
            timeout_s: the page is on disk and the process gone this long after the last sign of
                life.
            describe_step: more about the present step, such as the hash of its samples; called when
                it is late, on the watchdog's thread.
        """
        self.clock, self.hosts, self.global_rank = clock, hosts, global_rank
        self.describe_step, self.timeout_s = describe_step, timeout_s
        # Late ranks wait this long for one another's sightings.
        self.grace_s = min(10.0, timeout_s / 4)
        self.logs = run_dir / "logs"
        self.folder = self.logs / f".hang-{hosts[0].launched_at:.0f}"
        # A start has one page. A stopped rank that is woken when the others have left (Slurm sends
        # CONT before TERM) hears nobody: its page would blame them, in place of the true one.
        self.told = self.logs / f"{self.folder.name}.told"
        self._tick_s = self.grace_s / 20
        self._next_tick = time.monotonic()
        # (when it ended, how long it was): times in which this process did not run.
        self._absences: list[tuple[float, float]] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        """Start watching."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        """The thread: a report when the beat is late, the process's end when it stays late."""
        while not self._tick():
            beat = self.clock.now
            if self._age_s(beat) < self.timeout_s - self.grace_s:
                continue
            # The disk may be what hangs: the report has a thread of its own, and the end does not
            # wait for it.
            threading.Thread(
                target=self._report, args=(beat,), name="watchdog-report", daemon=True
            ).start()
            if self._stays(beat, until_s=self.timeout_s, pause=self._tick):
                os._exit(EXIT_HANG)

    def _report(self, beat: Beat) -> None:
        """Write down what this rank is doing; the lowest rank of those that did writes the page."""
        try:
            self._tell(beat)
        except OSError as error:  # no page then; each rank says in the log what it knows
            main = sys._current_frames()[threading.main_thread().ident or 0]
            say(
                f"error: no progress for {self._age_s(beat):.0f} s at step {beat.step}: "
                f"rank {self.global_rank} on {self.hosts[self.global_rank].node} is in "
                f"{doing(main) or beat.phase} (no page: {error})"
            )

    def _tell(self, beat: Beat) -> None:
        """The report on the disk: a sighting, and the page, or nothing when it went on."""
        if self.told.exists():
            return
        path = self._write_sighting()
        pause = partial(self._closed.wait, self._tick_s)
        if self._stays(beat, until_s=self.timeout_s - self.grace_s / 4, pause=pause):
            self._write_page()
        else:
            path.unlink(missing_ok=True)  # it went on

    def _stays(self, beat: Beat, *, until_s: float, pause: Callable[[], object]) -> bool:
        """Whether `beat` is still the last sign of life when it is `until_s` old; waits to see."""
        while self.clock.now is beat and self._age_s(beat) < until_s and not self._closed.is_set():
            pause()
        return self.clock.now is beat and not self._closed.is_set()

    def _tick(self) -> bool:
        """Wait a moment, and note how long the process was away meanwhile; whether it is closed.

        Called on the watchdog's own thread only, which does nothing else that takes time.
        """
        self._next_tick = time.monotonic() + self._tick_s
        is_closed = self._closed.wait(self._tick_s)
        now = time.monotonic()
        if now - self._next_tick > ABSENCE_S:
            self._absences.append((now, now - self._next_tick))
            self._next_tick = now
        return is_closed

    def _age_s(self, beat: Beat) -> float:
        """Seconds since the sign of life in which this process ran."""
        now, due = time.monotonic(), self._next_tick
        # After a stop the report's thread may run before the tick that notes the absence.
        unnoted = now - due if now - due > ABSENCE_S else 0.0
        away = sum(long for end, long in self._absences if end > beat.since)
        return now - beat.since - away - unnoted

    def _write_sighting(self) -> Path:
        """Write down what this rank is doing, what holds it up, and how its neighbours are."""
        beat, main = self.clock.now, sys._current_frames()[threading.main_thread().ident or 0]
        neighbours = [host for host in self.hosts if host.node == self.hosts[self.global_rank].node]
        sighting = Sighting(
            global_rank=self.global_rank,
            beats=beat.number,
            phase=beat.phase,
            step=beat.step,
            doing=doing(main) or beat.phase,
            age_s=round(self._age_s(beat), 1),
            note=self._note(),
            neighbours={str(host.global_rank): process_state(host.pid) for host in neighbours},
            collectives=self._collectives(),
            stacks=all_stacks(),
        )
        path = self.folder / f"{self.global_rank:05d}.json"
        # The disk may be what hangs: nothing here waits for it longer than it must.
        with whole_file(path, durable=False) as file:
            file.write(json.dumps(redact(asdict(sighting))).encode())
        return path

    def _collectives(self) -> list[str]:
        try:
            return waiting_collectives()
        except Exception as error:  # the recorder's format is torch's own
            return [repr(error)]

    def _note(self) -> str:
        try:
            return self.describe_step()
        except Exception as error:  # whatever is wrong with the note, the page must appear
            return repr(error)

    def _write_page(self) -> None:
        """Write the page and name the guilty, as the lowest rank that has reported."""
        pages = sorted(self.folder.glob("*.json"))
        if not pages or int(pages[0].stem) != self.global_rank:
            return
        try:
            self.told.touch(exist_ok=False)
        except FileExistsError:
            return
        seen = [Sighting(**json.loads(path.read_text())) for path in pages]
        step = max(sighting.step for sighting in seen)
        page = self.logs / f"hang-{step}.md"
        page.write_text(hang_page(seen, self.hosts, timeout_s=self.timeout_s))
        shutil.rmtree(self.logs / f"hang-{step}", ignore_errors=True)
        self.folder.rename(self.logs / f"hang-{step}")
        who, why = guilty(seen, self.hosts)
        say(
            f"error: no progress for {self.timeout_s:.0f} s at step {step}: "
            f"{describe_ranks(who, self.hosts)}: {why}\n"
            f"       the page {page} says what each rank was doing"
        )
