"""How many ranks share what: the only place where sizes are multiplied and what remains is divided.

ParallelConfig, world size -> ParallelSizes -> RunShape, connect()
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.training import ParallelConfig


@dataclass(frozen=True)
class ParallelSizes:
    """Ranks along each axis; their product is the number of ranks of the job."""

    tensor: int = 1
    """Ranks that share each layer's matrices."""
    pipeline: int = 1
    """Ranks that share the stack of layers."""
    data: int = 1
    """Parts of the batch."""
    context: int = 1
    """Ranks that share each sequence of a part."""
    expert: int = 1
    """Ranks, of those along tensor, context and data, that share each layer's experts; no axis of
    its own. 1: there are none, or every expert is split as any other matrix.
    """

    @classmethod
    def of(cls, parallel: ParallelConfig, *, data: int = 1) -> ParallelSizes:
        """The sizes that are set, with `data` parts of the batch."""
        return cls(
            tensor=parallel.tensor_parallel_size,
            pipeline=parallel.pipeline_parallel_size,
            data=data,
            expert=parallel.expert_parallel_size,
            context=parallel.context_parallel_size,
        )

    @classmethod
    def filling(cls, parallel: ParallelConfig, *, world_size: int) -> ParallelSizes:
        """The sizes that are set, with as many parts of the batch as `world_size` ranks hold.

        Some ranks are left over where it is no multiple of `ranks_per_part`.
        """
        return cls.of(parallel, data=world_size // cls.of(parallel).ranks_per_part)

    @property
    def ranks_per_copy(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline

    @property
    def replicas(self) -> int:
        """Copies of the model, each of which computes other tokens."""
        return self.data * self.context

    @property
    def ranks_per_part(self) -> int:
        """Ranks that compute one part of the batch."""
        return self.ranks_per_copy * self.context

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.ranks_per_part * self.data
