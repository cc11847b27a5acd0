"""Every error a user can cause, in one tree.

    PipelineError              printed as one message without a traceback; exit code 2
    |-- ConfigError            a setting is unknown, impossible, or contradicts another one
    |-- DataError              a dataset is missing, damaged, or does not fit the model
    |   |-- ShardError         one shard or member is missing, truncated or corrupt
    |   `-- DataUsedUp         every dataset reached its max_epochs; what is done is saved
    |-- CheckpointError        no usable checkpoint, or it belongs to another run
    |-- MachineError           this machine or cluster cannot run the job (disk, devices, links)
    `-- DivergedError          the numbers went bad and stayed bad; exit code 3

Exit codes of a training process: 0 finished, or saved and left on notice; 1 a bug (traceback in
logs/); 2 a problem the user can solve; 3 diverged; 4 ended by the watchdog; 128 + n killed by
signal n.

A message says what is wrong, the values, the rule, and the way out. Anything else that is raised is
a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import re

EXIT_BUG = 1
EXIT_HANG = 4


class PipelineError(Exception):
    """A problem the user can solve; the command line prints it without a traceback."""

    exit_code = 2


class ConfigError(PipelineError):
    """A setting is unknown, impossible, or contradicts another setting."""


class DataError(PipelineError):
    """A dataset is missing, damaged, or does not fit the model."""


class ShardError(DataError):
    """One shard or one of its members is missing, truncated or corrupt."""


class DataUsedUp(DataError):
    """Every dataset reached its max_epochs: on every rank, before the same step."""


class CheckpointError(PipelineError):
    """No usable checkpoint, or the checkpoint belongs to another run."""


class MachineError(PipelineError):
    """This machine or cluster cannot run the job: disk space, permissions, devices, links."""


# What a disk or its owner refuses, and the way out; no bug of ours.
_REFUSED = {
    errno.ENOSPC: "Free some space there, or choose another place",
    errno.EDQUOT: "Free some space there, or choose another place",
    errno.EFBIG: "Choose another place",
    errno.EROFS: "It is read-only: choose another place",
    errno.EACCES: "Ask for the right to it, or choose another place",
    errno.EPERM: "Ask for the right to it, or choose another place",
    errno.ENOTDIR: "A part of this path is no folder: choose another place",
    errno.EISDIR: "It is a folder: give the name of a file",
    errno.EEXIST: "Give the name of a file",
    errno.ENAMETOOLONG: "Choose a shorter name",
}


def of_the_machine(error: OSError) -> MachineError | None:
    """A file that cannot be written or opened, as a user's problem; None: it is none."""
    if error.errno == errno.ENOENT and "temporary directory" in (error.strerror or ""):
        return MachineError(
            "none of /tmp, /var/tmp and this folder takes a temporary file: they are full or "
            "read-only. Free some space there, or name a folder with TMPDIR=..."
        )
    way_out = _REFUSED.get(error.errno or 0)
    if way_out is None:
        return None
    name = error.filename2 or error.filename
    return MachineError(f"{name or 'the output'}: {error.strerror}. {way_out}.")


class DivergedError(PipelineError):
    """Loss or gradients were not finite, or spiked, for longer than the settings allow."""

    exit_code = 3


class Problems:
    """What several checks found, raised at once: a user mends all of it in one go.

    with problems: check()      keeps the PipelineError that the check raises, and goes on
    problems.raise_all()        raises it alone as it was, several as one, each on its own line
    """

    def __init__(self) -> None:
        self.found: list[PipelineError] = []

    def __enter__(self) -> None:
        """Begin a check."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        """Keep what the check raised if it is a user's problem."""
        if isinstance(error, PipelineError):
            self.found.append(error)
            return True
        return False

    def raise_all(self) -> None:
        """Raise what was found, if anything was."""
        if self.found:
            several = type(self.found[0])("\n".join(map(str, self.found)))
            raise self.found[0] if len(self.found) == 1 else several


def visible(text: str) -> str:
    r"""`text` with what commands a terminal escaped: control characters, marks of direction.

    Names and messages come from files too: ESC in one could hide the line before it. Line ends and
    tabs stay; half a surrogate pair, a byte of a name that is no UTF-8, is written `\udcff`.
    """
    return _COMMANDS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printed(error: PipelineError) -> str:
    """The message as a command prints it, further lines below the first."""
    return visible(f"error: {error}").replace("\n", "\n       ")
