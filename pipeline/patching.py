"""The one door for changes to foreign code.

    replace(bf16_optimizer, "is_invalid_grad_norm", ours, why=..., upstream=..., proof=...)

A plain assignment to a name that a release has renamed does nothing and says nothing; here it is
refused. What came through is listed by `changes()`. tests/engine/test_changes_are_needed.py leaves
out one change at a time and demands that its proof, a test, then fails.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pipeline.errors import MachineError


@dataclass(frozen=True)
class Change:
    """A name of a library that means something of ours."""

    where: str
    """Module or class that the name belongs to, such as deepspeed.runtime.zero.stage3."""
    name: str
    why: str
    """What goes wrong, or is slow, without it."""
    upstream: str
    """Whether its authors know: a link, or "not reported"."""
    proof: str
    """Node id of the test that fails without it."""

    @property
    def key(self) -> str:
        """Where and what."""
        return f"{self.where}.{self.name}"

    @property
    def title(self) -> str:
        """Where, what and why, unique: a name may be changed for several reasons."""
        return f"{self.key}: {self.why}"


_changes: dict[str, Change] = {}
_left_out: set[str] = set()
_originals: dict[str, tuple[Change, Any, Any]] = {}
_ABSENT = object()


def replace(owner: Any, name: str, new: Any, *, why: str, upstream: str, proof: str) -> None:
    """Let `owner` have `new` under `name`.

    Args:
        owner: a module, class or object of a library.
        name: an attribute that it has.
        new: what stands there from now on.
        why, upstream, proof: as in Change.

    Raises:
        MachineError: there is no such name, so the change would have no effect.
    """
    change = Change(_place(owner), name, why, upstream, proof)
    if not hasattr(owner, name):
        library = change.where.partition(".")[0]
        raise MachineError(
            f"{library} {_version(library)} has no {change.key}, which must be replaced here: "
            f"{why}. Install the version in constraints.txt (pip install -c constraints.txt "
            f"{library}), or adapt the change where this was raised."
        )
    _apply(change, owner, new)


def supply(owner: Any, name: str, new: Any, *, why: str, upstream: str, proof: str) -> None:
    """As `replace`, for a name that `owner` uses and may lack; where it has it, it is kept."""
    if not hasattr(owner, name):
        _apply(Change(_place(owner), name, why, upstream, proof), owner, new)


def changes() -> list[Change]:
    """Every change of this process, sorted by place; several objects of a class count once."""
    return [_changes[title] for title in sorted(_changes)]


def leave_out(which: str) -> None:
    """Undo a change for the rest of this process: the test that it is needed.

    Args:
        which: Change.title; or, for whatever reason it is made, Change.key or its name alone.
    """
    _left_out.add(which)
    for change, owner, original in _originals.values():
        if not _is_left_out(change):
            continue
        if original is _ABSENT:
            delattr(owner, change.name)
        else:
            setattr(owner, change.name, original)


def _apply(change: Change, owner: Any, new: Any) -> None:
    _changes[change.title] = change
    if _is_left_out(change):
        return
    # Modules and classes live as long as the process; an object is not kept alive for the register.
    if isinstance(owner, ModuleType | type) and change.key not in _originals:
        _originals[change.key] = (change, owner, getattr(owner, change.name, _ABSENT))
    setattr(owner, change.name, new)


def _is_left_out(change: Change) -> bool:
    return bool({change.title, change.key, change.name} & _left_out)


def _place(owner: Any) -> str:
    if isinstance(owner, ModuleType):
        return owner.__name__
    kind = owner if isinstance(owner, type) else type(owner)
    return f"{kind.__module__}.{kind.__qualname__}"


def _version(library: str) -> str:
    """Of the installed distribution that has the package; megatron lies in megatron-core."""
    for distribution in importlib.metadata.packages_distributions().get(library, [library]):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of an unknown version"
