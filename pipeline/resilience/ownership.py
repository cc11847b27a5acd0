"""A run folder has one owner: the second start is refused, a dead owner's place is taken over.

    runs/NAME/owner/00000007.json    the claim of the seventh owner; the highest number owns

    claim --create 00000008.json, as only one can--> Ownership --a thread--> mtime every BEAT_S
                                                               --the end-->  "released": true

Two starts in one folder would interleave their metrics and delete each other's checkpoints. Claims
are numbered, never replaced by others: whoever judged number 7 dead can only make number 8, so of
two that judge at once one loses, and one that slept over its verdict meets a higher number. It
needs what NFS has (link, rename, a server's clock), and no locks, which it may not have.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from pipeline.errors import MachineError
from pipeline.files import create_durably, open_regular, parse_json, read_file, write_durably
from pipeline.log import say
from pipeline.shapes import misfits

BEAT_S = 10.0
"""Between two signs of life."""
SILENCE_S = 120.0
"""An owner on another machine that is silent for so long is dead: a dozen missing beats."""


@dataclass(frozen=True)
class Claim:
    """Who owns a run folder."""

    node: str
    pid: int
    process_start: str
    """Clock ticks from boot to the process's start: tells it from a later one with its number."""
    machine: str
    """Boot and process namespace: only where it is ours does a pid mean what it means here."""
    job_id: str | None
    """Slurm's."""
    restart: int
    """How often Slurm has started the job again."""
    since: str
    token: str
    released: bool = False

    def describe(self) -> str:
        """The owner, for people."""
        job = f", Slurm job {self.job_id}" if self.job_id else ""
        return f"process {self.pid} on {self.node}{job}, since {self.since}"


# What a claim's file must be to be believed.
CLAIM = {
    "node": str,
    "pid": range(2**31),
    "process_start": str,
    "machine": str,
    "job_id": (str, None),
    "restart": range(2**31),
    "since": str,
    "token": str,
    "released?": bool,
}


class Ownership:
    """A claim that holds until the block ends; from `claim`."""

    def __init__(self, path: Path, mine: Claim) -> None:
        self.path, self.mine = path, mine
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)

    def __enter__(self) -> Ownership:
        """Give signs of life from now on."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Let the folder go, so that the next start need not ask whether this one lives."""
        self._closed.set()
        self._thread.join(BEAT_S)
        # Else the next start finds out that we are gone.
        with contextlib.suppress(OSError, MachineError):
            if _owner(self.path.parent)[0] == self.path:
                write_durably(self.path, _to_json(replace(self.mine, released=True)))

    def _beat(self) -> None:
        """Body of the thread: the file system's own clock is set on the claim, until the end."""
        while not self._closed.wait(BEAT_S):
            try:
                path, owner = _owner(self.path.parent)
                if path == self.path:
                    os.utime(self.path)  # without a time: a server's, not this machine's
                    continue
                # Nothing is left of the claim, and nobody has taken over: somebody cleaned up.
                if path is None and create_durably(self.path, _to_json(self.mine)):
                    continue
            except (OSError, MachineError):  # what is away now may be back at the next beat
                continue
            self._leave(owner)

    def _leave(self, owner: Claim | None) -> None:
        """End this process at once: it was stopped or cut off, and the run has another owner."""
        who = owner.describe() if owner else "another process"
        say(
            f"error: the run folder {self.path.parent.parent} has been taken over by {who}, "
            f"because this process gave no sign of life for more than {SILENCE_S:.0f} s. "
            "It ends here."
        )
        os._exit(MachineError.exit_code)


def claim(run_dir: Path, *, node: str) -> Ownership:
    """The run folder, made if need be, as this process's own.

    Waits up to SILENCE_S for a sign of life of an owner on another machine.

    Raises:
        MachineError: another process has it, and lives.
    """
    try:
        return _claim(run_dir, _claim_of_this_process(node))
    except OSError as error:
        raise MachineError(
            f"the run folder {run_dir} cannot be written ({error.strerror or error}): this start "
            "cannot claim it. Free its disk, or choose another folder with runs_dir=... or name=..."
        ) from None


def _claim(run_dir: Path, mine: Claim) -> Ownership:
    """The body of `claim`: judge the owner that is there, and be the only one with a number."""
    folder = run_dir / "owner"
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        path, owner = _owner(folder)
        if path is not None and (problem := _sign_of_life(path, owner, mine, wait_s=SILENCE_S)):
            raise MachineError(_refusal(run_dir, owner, problem))
        own = folder / f"{_number(path) + 1 if path else 1:08d}.json"
        if not _number(own):
            raise MachineError(f"{path} is the last number of a claim. Delete {folder}.")
        if not create_durably(own, _to_json(mine)):
            continue  # somebody was faster: judge that one
        if _owner(folder)[0] != own:  # our verdict was of an owner long gone
            own.unlink()
            continue
        for other in _claims(folder):
            if _number(other) < _number(own):
                other.unlink(missing_ok=True)
        return Ownership(own, mine)


def problem(run_dir: Path, *, node: str) -> str | None:
    """Why a start would be refused, without claiming anything; None when nothing is known of it.

    An owner on another machine has two beats to show that it lives; `claim` waits longer.
    """
    path, owner = _owner(run_dir / "owner")
    if path is None:
        return None
    try:
        found = _sign_of_life(path, owner, _claim_of_this_process(node), wait_s=2 * BEAT_S)
    except OSError:  # a folder in which nothing can be written: that is another check's to say
        return None
    return _refusal(run_dir, owner, found) if found else None


def _sign_of_life(path: Path, owner: Claim | None, mine: Claim, *, wait_s: float) -> str | None:
    """How the owner is known to live; None: it is gone, or was silent for `wait_s`."""
    if owner is not None:
        if owner.released:
            return None
        # Slurm starts a job again only when it has ended: no need to wait for its silence.
        if owner.job_id and owner.job_id == mine.job_id and owner.restart < mine.restart:
            return None
        # On one machine the kernel knows. The start time tells the process from one that has got
        # its number since; boot and namespace say whether numbers can be compared at all.
        if owner.node == mine.node and owner.machine == mine.machine and mine.machine:
            runs = _process_start(owner.pid) == owner.process_start
            return "it is running" if runs else None
    # Elsewhere only beats tell. Ages compare two times of the file system's own clock; those of two
    # machines may be minutes apart. Who has been silent for long needs no waiting.
    first, deadline = _mtime(path), time.monotonic() + wait_s - _age_s(path)
    while first is not None and _mtime(path) == first:
        if time.monotonic() >= deadline:
            return None
        time.sleep(min(1.0, BEAT_S / 10))
    now, owner = _owner(path.parent)
    is_over = now != path or (owner is not None and owner.released)
    return None if is_over else "it has just given a sign of life"


def _refusal(run_dir: Path, owner: Claim | None, problem: str) -> str:
    who = owner.describe() if owner else "a process that cannot be read of"
    return (
        f"{run_dir} is in use by {who}: {problem}. "
        "Two runs in one folder would destroy each other. "
        "Give this one another name=..., or end that one first."
    )


def _owner(folder: Path) -> tuple[Path | None, Claim | None]:
    """The highest claim and what it says; (None, None) when there is none."""
    path = max(_claims(folder), key=_number, default=None)
    if path is None:
        return None, None
    try:
        content = parse_json(read_file(path, inside=folder))
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            return _owner(folder)  # taken over between our two looks
        raise MachineError(
            f"{path} cannot be read ({error.strerror}): nobody can tell whose this run folder is. "
            "Delete it if the run is over."
        ) from None
    except ValueError:  # for a moment empty where links are unknown
        return path, None
    names = {field.name for field in fields(Claim)}
    if next(misfits(content, CLAIM), None) or not set(content) <= names:
        return path, None  # of a newer release
    return path, Claim(**content)


def _claims(folder: Path) -> list[Path]:
    """What is called like a claim, whatever it is."""
    return [path for path in folder.glob("*.json") if _number(path)]


def _claim_of_this_process(node: str, environment: Mapping[str, str] = os.environ) -> Claim:
    """What this process writes into the folder of the owner, with what tells it from others."""
    return Claim(
        node=node,
        pid=os.getpid(),
        process_start=_process_start(os.getpid()) or "",
        machine=_machine(),
        job_id=environment.get("SLURM_JOB_ID"),
        restart=int(environment.get("SLURM_RESTART_COUNT", 0)),
        since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        token=uuid.uuid4().hex,
    )


def _machine() -> str:
    """Names this boot and this container; '' where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """Clock ticks from boot to the start of a process of this machine; None: there is none."""
    try:
        # After the name, which may hold anything: state is field 3, the start time field 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _mtime(path: Path) -> int | None:
    """When the claim last gave a sign of life; None: it is gone. Opened, so that NFS asks anew."""
    try:
        with open_regular(path) as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _age_s(path: Path) -> float:
    """Seconds since the claim's last sign of life, by the clock that sets both times."""
    probe = path.with_name(f".now-{uuid.uuid4().hex}")
    try:
        probe.touch()
        os.utime(probe)
        now, then = _mtime(probe), _mtime(path)
    finally:
        probe.unlink(missing_ok=True)
    return max(0, now - then) / 1e9 if now is not None and then is not None else 0.0


def _number(path: Path) -> int:
    """Of a claim, from 1 on; 0 of any other file."""
    return int(path.stem) if re.fullmatch("[0-9]{8,12}", path.stem) else 0


def _to_json(content: Claim) -> bytes:
    return (json.dumps(asdict(content), indent=1) + "\n").encode()
