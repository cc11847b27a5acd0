"""The page that says who holds a hanging run up, and what each rank was doing.

    Sighting of every rank that still runs --guilty--> (ranks, why) --hang_page--> Markdown

Who writes a sighting is judged by the number of phases it has been through, then by what its stack
shows; who writes none is named by its silence.
"""

from __future__ import annotations

import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pipeline.distributed.ranks import RankHost, describe_ranks

# What a frame's file says a rank is doing; the innermost frame that matches counts.
PLACES = (
    ("torch/distributed/", "collective"),
    ("deepspeed/comm/", "collective"),
    ("pipeline/distributed/waits.py", "collective"),
    ("autograd/", "backward"),
    ("pipeline/checkpoint/", "save"),
    ("pipeline/data/", "data"),
    ("pipeline/evaluation/", "evaluation"),
    ("torch/optim/", "optimizer"),
    ("pipeline/model/", "forward"),
)
WAYS_OUT = {
    "data": "- Is the file system or the object store of data.path slow? "
    "See data.prefetch_steps, data.cache_dir.",
    "save": "- Is the file system of runs_dir slow or full? "
    "A longer resilience.hang_timeout_s may be right.",
    "collective": "- `NCCL_DEBUG=INFO` names the link; "
    "`srun python -m pipeline.node_check` tests every node and link.",
}
MAX_STACKS = 4  # in the page; the folder beside it holds all


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
    collectives: list[str]
    """Which it has begun and not ended (flight_recorder.py)."""
    stacks: str


def guilty(seen: list[Sighting], hosts: list[RankHost]) -> tuple[list[int], str]:
    """(ranks, why): who holds the others up. All ranks when nothing tells them apart."""
    # 1. Silence weighs most: every rank that still runs wrote a sighting when its clock grew old;
    #    one that wrote none is stopped, dead or cut off, and the others can only wait for it.
    speaking = {sighting.global_rank for sighting in seen}
    if silent := [host.global_rank for host in hosts if host.global_rank not in speaking]:
        states = {int(rank): state for s in seen for rank, state in s.neighbours.items()}
        shown = {states[rank] for rank in silent if rank in states}
        if shown == {"T"}:
            return silent, "stopped by a signal (process state T)"
        if shown and shown <= {"Z", "-"}:
            return silent, "dead"
        return silent, "silent: stopped, dead, or its node cannot be reached"
    # 2. Then progress: ranks enter the same phases in the same order, so fewer beats is earlier in
    #    the program. Clocks are not compared: those of two nodes may be seconds apart.
    first = min(sighting.beats for sighting in seen)
    behind = [s for s in seen if s.beats == first]
    if len(behind) < len(seen):
        return [s.global_rank for s in behind], f"behind the others, in {_doings(behind)}"
    # 3. All in one phase: who waits in a collective waits for somebody, who does not is waited for.
    busy = [s for s in seen if not s.doing.startswith("collective")]
    if busy and len(busy) < len(seen):
        return [
            s.global_rank for s in busy
        ], f"in {_doings(busy)} while the others wait in a collective"
    # 4. All wait, or all work: no rank stands out, so none is named alone.
    everybody = f"all in {_doings(seen)}: a link between nodes, or NCCL, rather than one rank"
    return sorted(speaking), everybody


def hang_page(seen: list[Sighting], hosts: list[RankHost], *, timeout_s: float) -> str:
    """The page, in Markdown."""
    who, why = guilty(seen, hosts)
    nodes = sorted({hosts[rank].node for rank in who})
    sightings = {sighting.global_rank: sighting for sighting in seen}
    step = max(s.step for s in seen)
    lines = [
        f"# No progress for {timeout_s:.0f} s at step {step}",
        "",
        f"**{describe_ranks(who, hosts)}**: {why}.",
        f"{len(seen)} of {len(hosts)} ranks reported. {seen[0].note}",
        "",
        "| rank | node | step | phase | doing | for s |",
        "|---|---|---|---|---|---|",
    ]
    shown = [*who[:16], *[host.global_rank for host in hosts if host.global_rank not in who]][:32]
    for rank in sorted(shown):
        s = sightings.get(rank)
        cells = [str(s.step), s.phase, s.doing, str(s.age_s)] if s else ["?", "?", "no report", "?"]
        lines.append(f"| {rank} | {hosts[rank].node} | " + " | ".join(cells) + " |")
    if len(shown) < len(hosts):
        lines.append(f"\n{len(hosts) - len(shown)} more ranks are in the folder beside this page.")
    lines += ["", "## What to do", "", *_advice(who, nodes, hosts, sightings), ""]
    lines += _collectives([sightings[rank] for rank in sorted(shown) if rank in sightings])
    innocent = [rank for rank in sightings if rank not in who]
    for rank in [*[r for r in who if r in sightings], *innocent][:MAX_STACKS]:
        lines += [
            f"## Stacks of rank {rank} on {hosts[rank].node}",
            "",
            "```",
            sightings[rank].stacks,
            "```",
            "",
        ]
    return "\n".join(lines)


def _collectives(seen: list[Sighting]) -> list[str]:
    """A table of what ranks wait in; a rank without the others' newest number holds them up."""
    rows = [f"| {s.global_rank} | {entry} |" for s in seen for entry in s.collectives]
    if not rows:
        return []
    return ["## Collectives that wait", "", "| rank | collective |", "|---|---|", *rows, ""]


def _advice(
    who: list[int], nodes: list[str], hosts: list[RankHost], sightings: dict[int, Sighting]
) -> list[str]:
    """What to do next, by whether the guilty ranks are silent or say what they do."""
    away = [rank for rank in who if rank not in sightings]
    names = ",".join(nodes)
    if away:
        pids = ", ".join(f"{hosts[rank].pid} on {hosts[rank].node}" for rank in away[:8])
        return [
            f"- Look at process {pids}: `ps -o pid,stat,wchan,cmd`; T: stopped by somebody, D: "
            "disk or driver.",
            f"- Look at the node: `scontrol show node {names}`, `dmesg`, `nvidia-smi -q | grep -i "
            "xid`.",
            "- The job goes on at its newest checkpoint; elsewhere: "
            f"`scontrol update jobid=ID ExcNodeList={names}`.",
        ]
    doings = {sightings[rank].doing.split(" ")[0] for rank in who}
    return [
        *[way for place, way in WAYS_OUT.items() if place in doings],
        "- The stacks below show the line. "
        "If the step is right but slow, raise resilience.hang_timeout_s.",
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
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in frames
    )


def process_state(pid: int) -> str:
    """The state letter of a process on this node (R, S, D, T, Z), '-' when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "-"


def _doings(seen: list[Sighting]) -> str:
    return ", ".join(sorted({sighting.doing for sighting in seen}))
