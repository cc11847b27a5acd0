"""What happens to tensors while they are watched: memory, collectives, reads by the host.

Live bytes are those of storages on the device, in the allocator's blocks of 512 bytes; fragments,
the context and NCCL's buffers are not in them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pipeline.rehearsal.fake_cuda import place_of_caller

BLOCK_BYTES = 512
# Both tensors of these are arguments: the larger one is what the group handles together.
GATHERS = {"_allgather_base", "allgather", "_reduce_scatter_base", "reduce_scatter"}


class Watch(TorchDispatchMode):
    """Counts of the phase that was entered last; memory goes on from phase to phase."""

    def __init__(self, *, num_experts: int = 1, top_k: int = 1) -> None:
        """Args: num_experts, top_k: of a mixture, whose tokens go to all experts alike."""
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self._tokens_of_an_expert = 1
        self.live = 0
        self.group_names: dict[tuple[int, ...], str] = {}
        """Ranks of a group, ascending -> what it is called."""
        self._held: dict[int, int] = {}
        self.enter()

    def enter(self) -> None:
        """Begin a phase: its peak starts at what is live, its counts at zero."""
        self.peak = self.live
        self.collectives: Counter[tuple[str, str, str]] = Counter()
        """(group, operation, dtype) -> how many."""
        self.collective_bytes: Counter[tuple[str, str, str]] = Counter()
        self.host_reads: Counter[str] = Counter()
        """File and line that read a number back -> how often."""
        self.host_tensors: Counter[str] = Counter()
        """Operator -> how often it left more than one number on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.host_reads[place_of_caller()] += 1
            return self._number(args[0])
        if func is torch.ops.aten.masked_select.default:
            # Of (experts, tokens): which tokens go to an expert nobody knows, how many do all in
            # all is known. It splits them by numbers that it reads back (_number).
            self._tokens_of_an_expert = args[1].numel() // self.num_experts**2 * self.top_k
            return args[0].new_empty(self._tokens_of_an_expert * self.num_experts)
        if func.namespace == "c10d":
            self._count(func, args)
        out = func(*args, **(kwargs or {}))
        for item in tree_iter(out):
            if isinstance(item, torch.Tensor):
                self._hold(item, str(func))
        return out

    def _number(self, tensor: torch.Tensor) -> float | bool:
        """What the host is answered when it reads: nobody has the number."""
        if tensor.dtype is torch.bool:
            return True
        return 1.0 if tensor.dtype.is_floating_point else self._tokens_of_an_expert

    def _hold(self, tensor: torch.Tensor, made_by: str) -> None:
        """Count a storage until it is dropped, if it is on the device."""
        if tensor.device.type != "cuda":
            self.host_tensors[made_by] += tensor.device.type == "cpu" and tensor.numel() > 1
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self._held[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._held.pop(key, 0)

    def _count(self, func: Any, args: Any) -> None:
        """One collective, by group, operation and dtype; bytes are those of the larger side."""
        name = func._schema.name.split("::")[1].rstrip("_")
        sides = [_tensors(arg) for arg in args[: 2 if name in GATHERS else 1]]
        if not any(sides):
            return
        dtype = str(next(t.dtype for side in sides for t in side)).removeprefix("torch.")
        key = (self._group_name(args), name, dtype)
        self.collectives[key] += 1
        self.collective_bytes[key] += max(sum(map(_nbytes, side)) for side in sides)

    def _group_name(self, args: Any) -> str:
        """What the group of a collective is called, or its size."""
        boxed = next(
            arg
            for arg in args
            if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
        )
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(boxed))
        return self.group_names.get(tuple(sorted(ranks)), f"{len(ranks)} ranks")


def _tensors(arg: Any) -> list[torch.Tensor]:
    return [item for item in tree_iter(arg) if isinstance(item, torch.Tensor)]


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
