"""On one machine nothing of a run can be reached from another one."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from pipeline.distributed.rendezvous import is_one_machine, master_port, rendezvous_errors
from pipeline.errors import ConfigError, MachineError
from tests.support.preloaded import Preloaded
from tests.support.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(server: Preloaded, rank: int, port: int, address: str = "127.0.0.1") -> subprocess.Popen:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    return subprocess.Popen(
        [*server.python.split(), "-m", "tests.support.listening_rank"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_listening_socket_of_a_run_on_one_machine_is_loopback(server: Preloaded) -> None:
    """torch's store listens on all interfaces, gloo on the host name's address."""
    port = free_port()
    ranks = [start(server, rank, port) for rank in range(2)]
    found = [process.communicate(timeout=HANG_S) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], found
    addresses = [word for out, _ in found for word in out.split() if word != "listens"]
    # As /proc writes 127.0.0.1, also inside an IPv6 address: store and transport of rank 0, and
    # rank 1's transport.
    assert len(addresses) >= 3
    assert {address[-8:] for address in addresses} == {"0100007F"}


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"], ids=["own store", "torch's"])
def test_a_taken_port_is_named_with_the_way_out(address: str, server: Preloaded) -> None:
    """On several machines it ended in torch's traceback, and in exit code 1 of a bug."""
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(server, 0, port, address)
        _, error = process.communicate(timeout=HANG_S)
    assert process.returncode == MachineError.exit_code
    assert f"port {port} of this machine cannot be opened" in error
    assert "Set MASTER_PORT to a free one" in error


@pytest.mark.parametrize("text", ["", "abc", "0", "70000"])
def test_what_is_no_port_is_named(text):
    """It ended in `invalid literal for int()`, and a traceback."""
    with pytest.raises(ConfigError, match=f"MASTER_PORT={text} must be the number of a free port"):
        master_port({"MASTER_PORT": text})
    assert master_port({"MASTER_PORT": "29500"}) == 29500


@pytest.mark.parametrize(
    ("address", "local", "expected"),
    [
        ("127.0.0.1", "4", True),
        ("localhost", "4", True),
        ("::1", "4", True),
        ("127.0.0.1", "2", False),
        ("node7", "4", False),
        ("10.0.0.7", "4", False),
        ("", "4", False),
    ],
)
def test_one_machine_is_a_loopback_address_and_every_rank_here(address, local, expected):
    environment = {"MASTER_ADDR": address, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": local}
    assert is_one_machine(environment) is expected


def test_an_error_without_words_is_told_too() -> None:
    """Its first line was asked for, and there is none."""
    with pytest.raises(MachineError, match="do not find each other.*DistStoreError"):
        with rendezvous_errors():
            raise torch.distributed.DistStoreError("")
