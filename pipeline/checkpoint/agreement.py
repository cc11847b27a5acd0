"""What the ranks of a checkpoint do as one: gather, agree, or follow the main rank."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.checkpoint import folder as folders
from pipeline.errors import CheckpointError

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")


class Agreement:
    """Collectives over all ranks in which an exception of one is an exception of all."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Among the ranks of `group`, which are all of the job, over gloo."""
        self.group, self.rank, self.world_size = group, group.rank(), group.size()

    def gather(self, value: T) -> list[T]:
        """`value` of every rank."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_on_main(self, value: T) -> list[T]:
        """`value` of every rank, on rank 0; elsewhere an empty list, which costs no memory."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size if self.rank == 0 else []
        dist.gather_object(value, values or None, dst=0, group=self.group)
        return values

    def agree(self, function: Callable[[], T]) -> T:
        """function() of this rank; when it raises on any rank, every rank raises."""
        value, problem = None, None
        try:
            value = function()
        except Exception as error:
            problem = _as_checkpoint_error(error)
        if problems := [p for p in self.gather(problem) if p is not None]:
            raise problems[0]
        return value  # type: ignore[return-value]

    def on_main(self, function: Callable[[], T]) -> T:
        """function() of rank 0, on every rank; so is its exception."""
        import torch.distributed as dist

        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = function()
            except Exception as error:
                box[1] = _as_checkpoint_error(error)
        dist.broadcast_object_list(box, src=0, group=self.group)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def damage(
        self, checkpoint: Path, *, of: Callable[[str], bool] = lambda name: True
    ) -> list[str]:
        """What is wrong with a checkpoint, a line a file; every rank reads a share of its files."""
        parts = self.gather(self._own_damage(checkpoint, of))
        return [problem for part in parts for problem in part]

    def read_checked(self, checkpoint: Path, read: Callable[[], T]) -> tuple[list[str], T | None]:
        """What is wrong with a checkpoint, else read() of this rank; its exception is all ranks'.

        SHA-256 takes five times as long as reading: tensors are read while they are checked.
        So `read` may have met damage, and where there is any, what it filled or raised is void.
        The small files, which say what is read and how large it is, are checked before.
        """
        if problems := self.damage(checkpoint, of=lambda name: not folders.holds_tensors(name)):
            return problems, None
        value, error = None, None
        with ThreadPoolExecutor(1) as thread:
            check = thread.submit(self._own_damage, checkpoint, folders.holds_tensors)
            try:
                value = read()
            except Exception as raised:
                error = _as_checkpoint_error(raised)
        found = self.gather((check.result(), error))
        if problems := [problem for part, _ in found for problem in part]:
            return problems, None
        if errors := [error for _, error in found if error is not None]:
            raise errors[0]
        return [], value

    def _own_damage(self, checkpoint: Path, of: Callable[[str], bool]) -> list[str]:
        return folders.damage(checkpoint, of=of, part=self.rank, parts=self.world_size)


def _as_checkpoint_error(error: Exception) -> CheckpointError:
    """An exception that travels between ranks."""
    return (
        error
        if isinstance(error, CheckpointError)
        else CheckpointError(f"{type(error).__name__}: {error}")
    )
