"""With whom a rank shares a tensor, a stage, a gradient.

    Ranks -> connect() -> ParallelLayout

Ranks are laid out tensor fastest, then context, then data, then pipeline: tensor-parallel peers are
neighbours and so share a node.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pipeline.config.parallel_sizes import ParallelSizes
from pipeline.distributed.ranks import Ranks, export_to_environment, withdraw_from_environment
from pipeline.distributed.rendezvous import open_store, rendezvous_errors

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """One kind of parallelism, seen from this rank."""

    rank: int
    """Place of this rank among its peers, from 0."""
    size: int
    """Number of peers, this rank included."""
    group: dist.ProcessGroup
    """The peers."""


@dataclass(frozen=True)
class ParallelLayout:
    """Coordinates of this rank and the groups it talks in."""

    ranks: Ranks
    tensor: Axis
    """Ranks that share each layer's matrices."""
    pipeline: Axis
    """Ranks that share the stack of layers."""
    context: Axis
    """Ranks that share each sequence."""
    data: Axis
    """Parts of the batch; the loader knows no other axis."""
    replica: Axis
    """Copies of the model, context x data: ranks with the same weights and other tokens. Gradients
    are summed over them, and ZeRO splits what it splits among them.
    """
    stage: Axis
    """Ranks that share this rank's layers, in whatever way: tensor-parallel peers and copies."""
    expert: Axis
    """Ranks that share each layer's experts, of those along tensor, context and data; alone: no
    sharing.
    """
    expert_data: Axis
    """Copies of the same experts; the same ranks as `replica` unless experts span it."""
    host_group: dist.ProcessGroup
    """All ranks over gloo: for flags and facts that must not wait for the device."""
    device: torch.device

    @property
    def experts_span_data(self) -> bool:
        """Whether data-parallel ranks hold different experts, and so reduce them among fewer."""
        return self.expert.size > self.tensor.size


def connect(
    ranks: Ranks, sizes: ParallelSizes, *, timeout_s: float = 1800.0, announce: bool = True
) -> ParallelLayout:
    """Form every process group. Collective: call on every rank.

    Args:
        ranks: this process's place.
        sizes: ranks along each axis; their product is `ranks.world_size`.
        timeout_s: a collective that takes longer raises on its ranks.
        announce: set RANK and its kin for DeepSpeed, until disconnect(); one process without
            DeepSpeed needs them not, and what it starts later would take itself for a rank.
    """
    assert sizes.world_size == ranks.world_size, (sizes, ranks)
    assert announce or ranks.world_size == 1, ranks
    import torch
    import torch.distributed as dist

    from pipeline.distributed import megatron_on_cpu, shared_gloo

    megatron_on_cpu.install()
    shared_gloo.share_transport()
    from megatron.core import parallel_state

    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    timeout = timedelta(seconds=timeout_s)
    if announce:
        # DeepSpeed takes LOCAL_RANK for the device's number: with one visible device a rank
        # (--gpus-per-task=1) every rank but 0 would ask for a device that is not there.
        export_to_environment(ranks, local_rank=device.index if on_cuda else ranks.local_rank)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # for resilience/flight_recorder.py
    if not dist.is_initialized():
        with rendezvous_errors():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
                rank=ranks.global_rank,
                world_size=ranks.world_size,
                timeout=timeout,
                device_id=device if on_cuda else None,
                store=open_store(ranks, timeout=timeout),  # None: env://
            )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            sizes.tensor,
            sizes.pipeline,
            context_parallel_size=sizes.context,
            expert_model_parallel_size=sizes.expert,
            expert_tensor_parallel_size=1 if sizes.expert > 1 else None,  # None: as the others
            distributed_timeout_minutes=max(1, int(timeout_s / 60)),
        )
    return ParallelLayout(
        ranks=ranks,
        **_axes(parallel_state),
        host_group=dist.new_group(backend="gloo", timeout=timeout)
        if on_cuda
        else dist.distributed_c10d._get_default_group(),
        device=device,
    )


def _axes(groups: Any) -> dict[str, Axis]:
    """By their names in ParallelLayout, of megatron-core's parallel_state."""
    return {
        "tensor": _axis(groups.get_tensor_model_parallel_group()),
        "pipeline": _axis(groups.get_pipeline_model_parallel_group()),
        "context": _axis(groups.get_context_parallel_group()),
        "data": _axis(groups.get_data_parallel_group()),
        "replica": _axis(groups.get_data_parallel_group(with_context_parallel=True)),
        "expert": _axis(groups.get_expert_model_parallel_group()),
        "expert_data": _axis(groups.get_expert_data_parallel_group()),
        "stage": _axis(groups.get_tensor_and_data_parallel_group(with_context_parallel=True)),
    }


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(group.rank(), group.size(), group)


def disconnect() -> None:
    """Tear every process group down, so that another layout can be formed in this process."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    withdraw_from_environment()
