"""Who am I among the ranks, and with whom do I share a tensor, a stage, a gradient.

    environment (srun, torchrun, or one process) -> Ranks -> connect() -> ParallelLayout

Ranks are laid out tensor fastest, then data, then pipeline: tensor-parallel peers are neighbours and so share a node.
The only importer of megatron-core's parallel_state.
"""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


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
    elif "SLURM_STEP_ID" in environment and environment.get("SLURM_PROCID"):  # under srun, not in the batch script
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        default_local = {"SLURM_STEP_TASKS_PER_NODE": "1"}
    else:
        return Ranks(0, 1, 0, 1, node)
    try:
        # tasks per node may read "2(x3)": the first number is this node's when nodes are alike
        values = [int(environment.get(n, default_local.get(n, "")).split("(")[0].split(",")[0]) for n in names]
    except ValueError:
        shown = ", ".join(f"{n}={environment.get(n)}" for n in names)
        raise ConfigError(
            f"the launcher's environment is incomplete: {shown}. Start with launch/local.sh or srun."
        ) from None
    rank, world_size, local_rank, local_world_size = values
    if not 0 <= rank < world_size:
        raise ConfigError(f"{names[0]}={rank} must be below {names[1]}={world_size}.")
    return Ranks(rank, world_size, local_rank, local_world_size, node)


def placement_warning(ranks: Ranks, *, tensor_parallel_size: int) -> str | None:
    """Why tensor-parallel peers do not share a node, or None where they do.

    Peers are neighbours in rank order, and launchers fill one node before the next.
    """
    if ranks.local_world_size >= ranks.world_size or ranks.local_world_size % tensor_parallel_size == 0:
        return None
    return (
        f"parallel.tensor_parallel_size={tensor_parallel_size} does not divide the {ranks.local_world_size} ranks "
        "of a node: "
        "tensor-parallel peers on different nodes exchange activations in every block over the network. "
        f"Use a divisor of {ranks.local_world_size}, and parallel.pipeline_parallel_size between nodes."
    )


@dataclass(frozen=True)
class ParallelLayout:
    """Coordinates of this rank and the groups it talks in."""

    ranks: Ranks
    tensor_rank: int
    tensor_parallel_size: int
    pipeline_rank: int
    pipeline_parallel_size: int
    data_rank: int
    data_parallel_size: int
    tensor_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    host_group: dist.ProcessGroup
    """All ranks over gloo: for flags and facts that must not wait for the device."""
    device: torch.device


def connect(
    ranks: Ranks, *, tensor_parallel_size: int, pipeline_parallel_size: int, timeout_s: float = 1800.0
) -> ParallelLayout:
    """Form every process group. Collective: call on every rank.

    Args:
        ranks: this process's place.
        timeout_s: a collective that takes longer raises on its ranks.
    """
    import torch
    import torch.distributed as dist

    from pipeline import cpu_shim, gloo

    cpu_shim.install()
    gloo.share_transport()
    from megatron.core import parallel_state

    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    timeout = timedelta(seconds=timeout_s)
    export_to_environment(ranks)
    if not dist.is_initialized():
        # One process needs no rendezvous and no free port.
        store = {"store": dist.HashStore()} if ranks.world_size == 1 else {"init_method": "env://"}
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            rank=ranks.global_rank,
            world_size=ranks.world_size,
            timeout=timeout,
            device_id=device if on_cuda else None,
            **store,
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_parallel_size, pipeline_parallel_size, distributed_timeout_minutes=max(1, int(timeout_s / 60))
        )
    return ParallelLayout(
        ranks=ranks,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_size=tensor_parallel_size,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_parallel_size=pipeline_parallel_size,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        host_group=dist.new_group(backend="gloo", timeout=timeout)
        if on_cuda
        else dist.distributed_c10d._get_default_group(),
        device=device,
    )


def disconnect() -> None:
    """Tear every process group down, so that another layout can be formed in this process."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def export_to_environment(ranks: Ranks) -> None:
    """Set the variables torch and DeepSpeed read, so that srun, torchrun and one process look alike to them."""
    values = {
        "RANK": ranks.global_rank,
        "WORLD_SIZE": ranks.world_size,
        "LOCAL_RANK": ranks.local_rank,
        "LOCAL_WORLD_SIZE": ranks.local_world_size,
    }
    os.environ.update({key: str(value) for key, value in values.items()})
    if ranks.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")  # never opened: one process uses an in-memory store
    elif "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"{ranks.world_size} ranks need MASTER_ADDR and MASTER_PORT to find each other. "
            "launch/pretrain.slurm and launch/local.sh set them."
        )


def seed_step(seed: int, step: int, layout: ParallelLayout, *, micro_batch: int = 0) -> None:
    """Set the dropout streams for one optimizer step: a pure function of (seed, step, place), so nothing is saved.

    Tensor-parallel peers share the default stream (they hold the same activations) and differ in the tracked one
    (their heads, or their slice of the sequence, are different ones).
    """
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    place = (seed, step, micro_batch, layout.data_rank, layout.pipeline_rank)
    torch.default_generator.manual_seed(_hash(*place))  # torch.manual_seed costs a stack trace here
    if layout.device.type == "cuda":
        torch.cuda.manual_seed(_hash(*place))
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("model-parallel-rng", _hash(*place, 1 + layout.tensor_rank))


def _hash(*numbers: int) -> int:
    """A seed below 2^31 from a tuple of integers, the same on every machine."""
    return zlib.crc32(repr(numbers).encode()) & 0x7FFFFFFF


class Mpu:
    """megatron-core's groups under the names DeepSpeed's plain engine asks for (model parallel = tensor parallel)."""

    def __getattr__(self, name: str) -> Any:
        """parallel_state's attribute of that name."""
        from megatron.core import parallel_state

        return getattr(parallel_state, name.replace("get_model_parallel", "get_tensor_model_parallel"))
