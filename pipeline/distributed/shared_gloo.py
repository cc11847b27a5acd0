"""One gloo transport a process instead of one per process group.

torch gives every gloo group a transport of its own, whose thread wakes a hundred times a second for
as long as the process lives. megatron-core and DeepSpeed form twenty groups in each process: 1.6 %
of a CPU training step went there (docs/performance.md). Groups work the same over a shared
transport.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed import ProcessGroupGloo, distributed_c10d

from pipeline.distributed.rendezvous import is_one_machine
from pipeline.patching import replace


@cache
def _transports() -> list[Any]:
    # As torch chooses them (ProcessGroupGloo's constructor): the interfaces named, else the host
    # name's address.
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    if names:
        return [ProcessGroupGloo.create_device(interface=name) for name in names]
    if is_one_machine():  # the host name's address may be one that strangers reach
        return [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    return [ProcessGroupGloo.create_default_device()]


class _AlsoPlain(type(ProcessGroupGloo)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: object) -> bool:  # torch asks whether a backend is gloo
        return isinstance(instance, ProcessGroupGloo)


class _SharedGloo(ProcessGroupGloo, metaclass=_AlsoPlain):
    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        timeout: timedelta = timedelta(minutes=30),
        **settings: Any,
    ) -> None:
        # The constructor that takes devices takes nothing else: what torch asks for (2.14:
        # enable_reconfigure) goes into the options. A setting that they lack raises here, with
        # its name, rather than being dropped.
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        for name, value in {"_devices": _transports(), "_timeout": timeout, **settings}.items():
            setattr(options, name, value)
        super().__init__(store, rank, size, options)


def share_transport() -> None:
    """Let every gloo group formed from now on use this process's one transport."""
    replace(
        distributed_c10d,
        "ProcessGroupGloo",
        _SharedGloo,
        why="every gloo group has a thread that wakes a hundred times a second",
        upstream="not reported",
        proof="tests/distributed/test_shared_gloo.py",
    )
