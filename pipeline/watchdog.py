"""No run hangs for ever: a rank without progress leads to one page that says who and where, and to the job's end.

    each rank, a thread: Clock.now is old --> logs/.hang-<start>/00003.json   what this rank was doing, its stacks
    lowest rank that writes one: waits for the others' --> logs/hang-<step>.md, exit code 4 on every rank

While all goes well nothing is written and nothing is sent. A rank that is stopped, dead, or cut off writes no page:
its silence names it. Who writes is judged by the number of phases it has been through, then by what its stack shows.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from pipeline.errors import EXIT_HANG
from pipeline.goodput import Beat, Clock

# What a frame's file says a rank is doing; the innermost frame that matches counts.
PLACES = (
    ("torch/distributed/", "collective"),
    ("deepspeed/comm/", "collective"),
    ("autograd/", "backward"),
    ("pipeline/checkpoint", "save"),
    ("pipeline/data/", "data"),
    ("pipeline/evaluate", "evaluation"),
    ("torch/optim/", "optimizer"),
    ("pipeline/model/", "forward"),
)
WAYS_OUT = {
    "data": "- Is the file system or the object store of data.path slow? See data.prefetch_steps, data.cache_dir.",
    "save": "- Is the file system of runs_dir slow or full? A longer resilience.hang_timeout_s may be right.",
    "collective": "- `NCCL_DEBUG=INFO` names the link; `srun python -m pipeline.node_check` tests every node and link.",
}
MAX_STACKS = 4  # in the page; the folder beside it holds all


@dataclass(frozen=True)
class RankFact:
    """Where a rank lives."""

    global_rank: int
    node: str
    pid: int
    launched_at: float


@dataclass(frozen=True)
class Sighting:
    """What one rank knows about itself, and about the processes beside it, once it is late."""

    global_rank: int
    beats: int
    phase: str
    step: int
    doing: str
    age_s: float
    note: str
    neighbours: dict[str, str]
    """Rank to process state letter, for the ranks of this node: T is stopped, Z and - are dead."""
    stacks: str


def gather_rank_facts(fact: RankFact) -> list[RankFact]:
    """Every rank's fact, by rank. Collective: call on every rank."""
    import torch.distributed as dist

    facts: list[RankFact] = [fact] * dist.get_world_size()
    dist.all_gather_object(facts, fact)
    return facts


class Watchdog:
    """A daemon thread that ends a run which makes no progress; a context manager."""

    def __init__(
        self, clock: Clock, *, run_dir: Path, ranks: list[RankFact], global_rank: int, timeout_s: float
    ) -> None:
        """Watch `clock`.

        Args:
            clock: beaten by the trainer.
            run_dir: the page goes to its logs/.
            ranks: all ranks, from gather_rank_facts.
            global_rank: this rank.
            timeout_s: the page is on disk and the process gone this long after the last sign of life.
        """
        self.clock, self.ranks, self.global_rank = clock, ranks, global_rank
        self.note: Callable[[], str] = str
        """More about the present step, such as the hash of its samples; called when it is late."""
        self.timeout_s = timeout_s
        # Late ranks wait this long for one another's sightings.
        self.grace_s = min(10.0, timeout_s / 4)
        self.logs = run_dir / "logs"
        self.folder = self.logs / f".hang-{ranks[0].launched_at:.0f}"
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
        while not self._closed.wait(self.grace_s / 4):
            beat = self.clock.now
            if self._age_s(beat) < self.timeout_s - self.grace_s:
                continue
            # The disk may be what hangs: the report has a thread of its own, and the end does not wait for it.
            threading.Thread(target=self._report, args=(beat,), name="watchdog-report", daemon=True).start()
            if self._stays(beat, until_s=self.timeout_s):
                os._exit(EXIT_HANG)

    def _report(self, beat: Beat) -> None:
        """Write down what this rank is doing; if it lasts, and this is the lowest rank that did so, write the page."""
        path = self._write_sighting()
        if self._stays(beat, until_s=self.timeout_s - self.grace_s / 4):
            self._write_page()
        else:
            path.unlink(missing_ok=True)  # it went on

    def _stays(self, beat: Beat, *, until_s: float) -> bool:
        """Whether `beat` is still the last sign of life when it is `until_s` old; waits until that is known."""
        while self.clock.now is beat and self._age_s(beat) < until_s and not self._closed.is_set():
            self._closed.wait(self.grace_s / 20)
        return self.clock.now is beat and not self._closed.is_set()

    def _age_s(self, beat: Beat) -> float:
        return time.monotonic() - beat.since

    def _write_sighting(self) -> Path:
        beat, main = self.clock.now, sys._current_frames()[threading.main_thread().ident or 0]
        neighbours = [fact for fact in self.ranks if fact.node == self.ranks[self.global_rank].node]
        sighting = Sighting(
            global_rank=self.global_rank,
            beats=beat.number,
            phase=beat.phase,
            step=beat.step,
            doing=doing(main) or beat.phase,
            age_s=round(self._age_s(beat), 1),
            note=self._note(),
            neighbours={str(fact.global_rank): process_state(fact.pid) for fact in neighbours},
            stacks=all_stacks(),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.global_rank:05d}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(sighting)))
        os.replace(temporary, path)
        return path

    def _note(self) -> str:
        try:
            return self.note()
        except Exception as error:  # whatever is wrong with the note, the page must appear
            return repr(error)

    def _write_page(self) -> None:
        pages = sorted(self.folder.glob("*.json"))
        if not pages or int(pages[0].stem) != self.global_rank:
            return
        seen = [Sighting(**json.loads(path.read_text())) for path in pages]
        step = max(sighting.step for sighting in seen)
        page = self.logs / f"hang-{step}.md"
        page.write_text(hang_page(seen, self.ranks, timeout_s=self.timeout_s))
        shutil.rmtree(self.logs / f"hang-{step}", ignore_errors=True)
        self.folder.rename(self.logs / f"hang-{step}")
        who, why = guilty(seen, self.ranks)
        print(
            f"error: no progress for {self.timeout_s:.0f} s at step {step}: {name(who, self.ranks)}: {why}\n"
            f"       the page {page} says what each rank was doing",
            file=sys.stderr,
            flush=True,
        )


def guilty(seen: list[Sighting], ranks: list[RankFact]) -> tuple[list[int], str]:
    """(ranks, why): who holds the others up. All ranks when nothing tells them apart."""
    speaking = {sighting.global_rank for sighting in seen}
    if silent := [fact.global_rank for fact in ranks if fact.global_rank not in speaking]:
        states = {int(rank): state for s in seen for rank, state in s.neighbours.items()}
        shown = {states[rank] for rank in silent if rank in states}
        if shown == {"T"}:
            return silent, "stopped by a signal (process state T)"
        if shown and shown <= {"Z", "-"}:
            return silent, "dead"
        return silent, "silent: stopped, dead, or its node cannot be reached"
    first = min(sighting.beats for sighting in seen)
    behind = [s for s in seen if s.beats == first]
    if len(behind) < len(seen):
        return [s.global_rank for s in behind], f"behind the others, in {_doings(behind)}"
    busy = [s for s in seen if not s.doing.startswith("collective")]
    if busy and len(busy) < len(seen):
        return [s.global_rank for s in busy], f"in {_doings(busy)} while the others wait in a collective"
    return sorted(speaking), f"all in {_doings(seen)}: a link between nodes, or NCCL, rather than one rank"


def hang_page(seen: list[Sighting], ranks: list[RankFact], *, timeout_s: float) -> str:
    """The page, in Markdown."""
    who, why = guilty(seen, ranks)
    nodes = sorted({ranks[rank].node for rank in who})
    sightings = {sighting.global_rank: sighting for sighting in seen}
    step = max(s.step for s in seen)
    lines = [
        f"# No progress for {timeout_s:.0f} s at step {step}",
        "",
        f"**{name(who, ranks)}**: {why}.",
        f"{len(seen)} of {len(ranks)} ranks reported. {seen[0].note}",
        "",
        "| rank | node | step | phase | doing | for s |",
        "|---|---|---|---|---|---|",
    ]
    shown = [*who[:16], *[fact.global_rank for fact in ranks if fact.global_rank not in who]][:32]
    for rank in sorted(shown):
        s = sightings.get(rank)
        cells = [str(s.step), s.phase, s.doing, str(s.age_s)] if s else ["?", "?", "no report", "?"]
        lines.append(f"| {rank} | {ranks[rank].node} | " + " | ".join(cells) + " |")
    if len(shown) < len(ranks):
        lines.append(f"\n{len(ranks) - len(shown)} more ranks are in the folder beside this page.")
    lines += ["", "## What to do", "", *_advice(who, nodes, ranks, sightings), ""]
    innocent = [rank for rank in sightings if rank not in who]
    for rank in [*[r for r in who if r in sightings], *innocent][:MAX_STACKS]:
        lines += [f"## Stacks of rank {rank} on {ranks[rank].node}", "", "```", sightings[rank].stacks, "```", ""]
    return "\n".join(lines)


def _advice(who: list[int], nodes: list[str], ranks: list[RankFact], sightings: dict[int, Sighting]) -> list[str]:
    away = [rank for rank in who if rank not in sightings]
    names = ",".join(nodes)
    if away:
        pids = ", ".join(f"{ranks[rank].pid} on {ranks[rank].node}" for rank in away[:8])
        return [
            f"- Look at process {pids}: `ps -o pid,stat,wchan,cmd`; T: stopped by somebody, D: disk or driver.",
            f"- Look at the node: `scontrol show node {names}`, `dmesg`, `nvidia-smi -q | grep -i xid`.",
            f"- The job goes on at its newest checkpoint; elsewhere: `scontrol update jobid=ID ExcNodeList={names}`.",
        ]
    doings = {sightings[rank].doing.split(" ")[0] for rank in who}
    return [
        *[way for place, way in WAYS_OUT.items() if place in doings],
        "- The stacks below show the line. If the step is right but slow, raise resilience.hang_timeout_s.",
    ]


def doing(frame: FrameType | None) -> str:
    """What a thread does, judged by its innermost telling frame; '' when none is."""
    while frame is not None:
        path = frame.f_code.co_filename.replace("\\", "/")
        for part, place in PLACES:
            if part in path:
                return f"{place} ({frame.f_code.co_name})"
        frame = frame.f_back
    return ""


def all_stacks() -> str:
    """Python stacks of all threads of this process, the main one first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame)) for ident, frame in frames
    )


def process_state(pid: int) -> str:
    """The state letter of a process on this node (R, S, D, T, Z), '-' when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "-"


def name(who: list[int], ranks: list[RankFact]) -> str:
    """`rank 3 on n2`, `ranks 4, 5 on n3`, at most eight spelt out."""
    nodes = sorted({ranks[rank].node for rank in who})
    numbers = ", ".join(map(str, who[:8])) + (f" and {len(who) - 8} more" if len(who) > 8 else "")
    return f"rank{'s' if len(who) > 1 else ''} {numbers} on {', '.join(nodes[:8])}"


def _doings(seen: list[Sighting]) -> str:
    return ", ".join(sorted({sighting.doing for sighting in seen}))
