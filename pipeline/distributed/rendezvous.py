"""Where the ranks of a job find each other, and who else can reach that place.

    one process        a store in memory: nothing listens
    one machine        TCPStore on 127.0.0.1 only: torch's own listens on every interface
    several machines   torch's env:// rendezvous: MASTER_ADDR and MASTER_PORT, see launch/README.md

A stranger who reaches the store can read and write the keys by which groups form, for the whole
run; it has no password.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from pipeline.distributed.ranks import Ranks
from pipeline.errors import ConfigError, MachineError

if TYPE_CHECKING:
    import torch.distributed as dist


def is_one_machine(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether all ranks are on this machine and say so: MASTER_ADDR is a loopback address."""
    address = environment.get("MASTER_ADDR", "")
    if environment.get("WORLD_SIZE") != environment.get("LOCAL_WORLD_SIZE"):
        return False
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def master_port(environment: Mapping[str, str] = os.environ) -> int:
    """MASTER_PORT.

    Raises:
        ConfigError: it is not set, or no number of a port.
    """
    text = environment.get("MASTER_PORT", "")
    if not (text.isdecimal() and 0 < int(text) < 65536):
        raise ConfigError(
            f"MASTER_PORT={text} must be the number of a free port of the main rank's machine, 1 "
            "to 65535. launch/local.sh and launch/pretrain.slurm set one."
        )
    return int(text)


def _taken(port: int, reason: str) -> str:
    return (
        f"port {port} of this machine cannot be opened ({reason}): another program has it. Set "
        "MASTER_PORT to a free one; launch/local.sh finds one by itself."
    )


@contextlib.contextmanager
def rendezvous_errors() -> Iterator[None]:
    """What torch says of a port or of ranks that it does not reach, as a MachineError."""
    import torch.distributed as dist

    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        port = os.environ.get("MASTER_PORT", "")
        if "EADDRINUSE" in reason:
            raise MachineError(_taken(int(port), "EADDRINUSE")) from error
        raise MachineError(
            f"the ranks do not find each other at MASTER_ADDR={os.environ.get('MASTER_ADDR')} "
            f"MASTER_PORT={port}: {reason[:300]}. All of them must be started, and reach that "
            "address."
        ) from error


def open_store(ranks: Ranks, *, timeout: timedelta) -> dist.Store | None:
    """The store of a job on one machine; None: torch finds it by itself (env://).

    Raises:
        MachineError: another program has MASTER_PORT.
    """
    import torch.distributed as dist

    if ranks.world_size == 1:
        return dist.HashStore()
    # torchrun keeps a store of its own, which its workers join.
    if not is_one_machine() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    address, port = "127.0.0.1", master_port()
    listener = None
    if ranks.global_rank == 0:
        try:
            # Handed over already bound; TCPStore closes it.
            listener = socket.create_server((address, port), backlog=ranks.world_size).detach()
        except OSError as error:
            raise MachineError(_taken(port, str(error.strerror))) from None
    return dist.TCPStore(
        address,
        port,
        ranks.world_size,
        is_master=ranks.global_rank == 0,
        timeout=timeout,
        master_listen_fd=listener,
    )
