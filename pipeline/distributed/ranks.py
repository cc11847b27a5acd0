"""Who am I among the ranks, and who are the others.

    environment (srun, torchrun, or one process) -> Ranks; gather_hosts -> a RankHost of every rank

Needs no torch until the others are asked.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """Place of this process in the job."""

    global_rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: str

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for the job."""
        return self.global_rank == 0


def ranks_from_environment(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks that torchrun or srun announced; one process when neither did. Needs no torch.

    Raises:
        ConfigError: the environment contradicts itself.
    """
    node = environment.get("SLURMD_NODENAME") or socket.gethostname()
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        default_local = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    elif "SLURM_STEP_ID" in environment and environment.get("SLURM_PROCID"):
        # Under srun: the batch script has no SLURM_PROCID.
        names = (
            "SLURM_PROCID",
            "SLURM_STEP_NUM_TASKS",
            "SLURM_LOCALID",
            "SLURM_STEP_TASKS_PER_NODE",
        )
        default_local = {"SLURM_STEP_TASKS_PER_NODE": "1"}
    else:
        return Ranks(0, 1, 0, 1, node)
    try:
        # tasks per node may read "2(x3)": the first number is this node's when nodes are alike
        values = [
            int(environment.get(n, default_local.get(n, "")).split("(")[0].split(",")[0])
            for n in names
        ]
    except ValueError:
        shown = ", ".join(f"{n}={environment.get(n)}" for n in names)
        raise ConfigError(
            f"the launcher's environment is incomplete: {shown}. "
            "Start with launch/local.sh or srun."
        ) from None
    rank, world_size, local_rank, local_world_size = values
    if not 0 <= rank < world_size:
        raise ConfigError(f"{names[0]}={rank} must be below {names[1]}={world_size}.")
    return Ranks(rank, world_size, local_rank, local_world_size, node)


def placement_warning(
    ranks: Ranks, *, tensor_parallel_size: int, context_parallel_size: int = 1
) -> str | None:
    """Why tensor-parallel peers, or the ranks that share a sequence, do not share a node, or None.

    Peers are neighbours in rank order, and launchers fill one node before the next.
    """
    local = ranks.local_world_size
    if local >= ranks.world_size:
        return None
    if local % tensor_parallel_size:
        return (
            f"parallel.tensor_parallel_size={tensor_parallel_size} does not divide the "
            f"{local} ranks of a node: tensor-parallel peers on different nodes "
            "exchange activations in every block over the network. Use a divisor of "
            f"{local}, and parallel.pipeline_parallel_size between nodes."
        )
    sharing = tensor_parallel_size * context_parallel_size
    if local % sharing and sharing % local:  # whole nodes that share sequences are meant to
        return (
            f"parallel.tensor_parallel_size * parallel.context_parallel_size ({sharing}) neither "
            f"divides the {local} ranks of a node nor is a multiple: some of the ranks that share "
            "a sequence exchange queries, keys and values over the network, and the others wait."
        )
    return None


_before: dict[str, str | None] = {}
"""What export_to_environment found, until withdraw_from_environment."""


def crowding_warning(ranks: Ranks, *, num_cores: int | None = None) -> str | None:
    """Why ranks that compute on the CPU are too many for it, or None where they are not.

    Args:
        num_cores: that the ranks of this node may use; None: as the system says.
    """
    cores = len(os.sched_getaffinity(0)) if num_cores is None else num_cores
    if ranks.local_world_size <= cores:
        return None
    return (
        f"{ranks.local_world_size} ranks compute on {cores} CPU core{'' if cores == 1 else 's'} of "
        f"this machine: in every step they wait for each other. Start {cores} or fewer, e.g. "
        f"launch/local.sh {cores} ..., with smaller parallel.*_parallel_size."
    )


def export_to_environment(ranks: Ranks, *, local_rank: int) -> None:
    """Set what torch and DeepSpeed read, so that srun, torchrun and one process look alike.

    Args:
        local_rank: the number of this rank's device among those that it sees.
    """
    values = {
        "RANK": ranks.global_rank,
        "WORLD_SIZE": ranks.world_size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": ranks.local_world_size,
    }
    for name in (*values, "MASTER_ADDR", "MASTER_PORT"):
        _before.setdefault(name, os.environ.get(name))
    os.environ.update({key: str(value) for key, value in values.items()})
    if ranks.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        # Never opened: one process uses an in-memory store.
        os.environ.setdefault("MASTER_PORT", "29500")
    elif "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"{ranks.world_size} ranks need MASTER_ADDR and MASTER_PORT to find each other. "
            "launch/pretrain.slurm and launch/local.sh set them."
        )


def withdraw_from_environment() -> None:
    """Put back what export_to_environment found.

    A program that this process starts later would take itself for a rank of the job that is over:
    under srun each rank of it was a run of its own.
    """
    for name, value in _before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    _before.clear()


@dataclass(frozen=True)
class RankHost:
    """Where a rank lives."""

    global_rank: int
    node: str
    pid: int
    launched_at: float


def gather_hosts(host: RankHost) -> list[RankHost]:
    """Where every rank lives, by rank. Collective: call on every rank."""
    import torch.distributed as dist

    hosts: list[RankHost] = [host] * dist.get_world_size()
    dist.all_gather_object(hosts, host)
    return hosts


def describe_ranks(who: list[int], hosts: list[RankHost]) -> str:
    """`rank 3 on n2`, `ranks 4, 5 on n3`, at most eight spelt out."""
    nodes = sorted({hosts[rank].node for rank in who})
    numbers = ", ".join(map(str, who[:8])) + (f" and {len(who) - 8} more" if len(who) > 8 else "")
    return f"rank{'s' if len(who) > 1 else ''} {numbers} on {', '.join(nodes[:8])}"
