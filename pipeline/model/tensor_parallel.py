"""What tensor parallelism touches: linears, embeddings, norms, dropout, partial gradients.

Every parameter that is split carries megatron-core's `tensor_model_parallel`, `partition_dim`,
`partition_stride`. With tensor_parallel_size 1 the parallel linears are plain F.linear: there is
nothing to communicate, and the bias is fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from pipeline.model.float8 import check_device
from pipeline.model.linear import LateProducts, multiply
from pipeline.model.lora import LowRankColumn, LowRankRow
from pipeline.model.partition import mark_split


class OwnProducts:
    """What a parallel linear, an nn.Module, computes by linear.py; nothing unless it is said."""

    weight: Any
    late: LateProducts | None = None
    is_float8 = False

    def leave_gradients_to(self, late: LateProducts) -> None:
        """Put the weight's gradients off: whoever has `late` works them off."""
        self.late = late

    @property
    def has_own_products(self) -> bool:
        """Whether it was said."""
        return self.late is not None or self.is_float8

    def product(
        self, x: Tensor, *, group: dist.ProcessGroup | None = None, gathers: bool = False
    ) -> Tensor:
        """X W^T; arguments as in `multiply`."""
        how: dict[str, Any] = {"late": self.late, "is_float8": self.is_float8}
        return multiply(x, self.weight, group=group, gathers=gathers, **how)


class ColumnLinear(OwnProducts, LowRankColumn, tensor_parallel.ColumnParallelLinear):
    """Rows of the weight are split over the tensor-parallel ranks; bias is added here."""

    def __init__(self, *args: Any, stride: int = 1, **kwargs: Any) -> None:
        # Not by megatron-core: behind a frozen weight it gives the bias no gradient.
        kwargs["skip_bias_add"] = True
        super().__init__(*args, stride=stride, **kwargs)
        mark_split(self.weight, 0, stride)
        mark_split(self.bias, 0, stride)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(output of this rank's rows, None)."""
        if self.has_own_products:
            group = self.tp_group if self.tp_group.size() > 1 else None
            out = self.product(x, group=group, gathers=self.sequence_parallel)
            out = out if self.bias is None else out + self.bias
        elif self.tp_group.size() == 1:
            out = F.linear(x, self.weight, self.bias)
        else:
            out, bias = super().forward(x, *args, **kwargs)
            out = out if bias is None else out + bias
        return self.plus_low_rank(out, x) if self.lora_scale else out, None


class RowLinear(OwnProducts, LowRankRow, tensor_parallel.RowParallelLinear):
    """The weight's columns are split over tensor-parallel ranks; the bias joins after the sum."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("is_expert"):
            kwargs["skip_bias_add"] = False
        super().__init__(*args, **kwargs)
        mark_split(self.weight, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(sum over ranks, None)."""
        if self.has_own_products:
            out = _sum_over_ranks(self.product(x), self)
            out = out if self.bias is None else out + self.bias
        elif self.tp_group.size() == 1:
            out = F.linear(x, self.weight, self.bias)
        else:
            out = super().forward(x)[0]
        return self.plus_low_rank(out, x) if self.lora_scale else out, None


def _sum_over_ranks(part: Tensor, linear: RowLinear) -> Tensor:
    """The ranks' sum, whole or this rank's slice of the sequence."""
    if linear.tp_group.size() == 1:
        return part
    if linear.sequence_parallel:
        return tensor_parallel.reduce_scatter_to_sequence_parallel_region(part)
    return tensor_parallel.reduce_from_tensor_model_parallel_region(part)


def own_linears(module: nn.Module) -> Iterator[ColumnLinear | RowLinear]:
    """The linears of attention and of MLPs that every token passes; not those of routed experts."""
    for part in module.modules():
        if isinstance(part, ColumnLinear | RowLinear) and not part.is_expert:
            yield part


def use_float8(module: nn.Module) -> None:
    """Let the linears of a rank's part of a model multiply in float8.

    Raises:
        ConfigError: the device cannot.
    """
    check_device()
    for linear in own_linears(module):
        linear.is_float8 = True


class VocabEmbedding(tensor_parallel.VocabParallelEmbedding):
    """Word embedding whose rows are split over the tensor-parallel ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, init_method=nn.init.normal_, **kwargs)
        mark_split(self.weight, 0, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Rows of `tokens`, the same on every rank."""
        return (
            F.embedding(tokens, self.weight)
            if self.tp_group.size() == 1
            else super().forward(tokens)
        )


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.shape, self.eps = (hidden_size,), eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = (
            None if config.normalization == "RMSNorm" else nn.Parameter(torch.zeros(hidden_size))
        )
        # Per-head norms see only this rank's heads, the others only this rank's slice of the
        # sequence.
        is_per_head = hidden_size != config.hidden_size
        for parameter in self.parameters():
            vars(parameter)["has_partial_gradient"] = is_per_head or config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """`x` normalised."""
        if self.bias is None:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


def gather_sequence(hidden: Tensor) -> Tensor:
    """(B, S, H) of hidden (S / ranks, B, H) that is split along the sequence."""
    return tensor_parallel.gather_from_sequence_parallel_region(hidden).transpose(0, 1)


def enter_output_projection(hidden: Tensor, config: TransformerConfig) -> Tensor:
    """(B, S, H) hidden on every tensor-parallel rank; the backward pass sums their gradients."""
    if config.sequence_parallel:
        return gather_sequence(hidden)
    if config.tensor_model_parallel_size == 1:
        return hidden
    return tensor_parallel.copy_to_tensor_model_parallel_region(hidden)


def dropout(x: Tensor, config: TransformerConfig, training: bool) -> Tensor:
    """Dropout of hidden states: one stream for all tensor-parallel ranks, or one each.

    One each under sequence parallelism, where the ranks hold different positions.
    """
    if not (config.hidden_dropout and training):
        return x
    if config.sequence_parallel:
        with get_cuda_rng_tracker().fork():
            return F.dropout(x, config.hidden_dropout)
    return F.dropout(x, config.hidden_dropout)


def partial_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Trained parameters of whose gradient each tensor-parallel rank computes a part.

    These are the norms, row-parallel biases and whole low-rank matrices under sequence parallelism,
    and the per-head norms always. Their parts must be summed over the ranks, before they are
    accumulated (sum_as_they_come) or after (sum_at_once): the sum is the same.
    """
    return [
        parameter
        for parameter in module.parameters()
        if parameter.requires_grad
        and (
            getattr(parameter, "has_partial_gradient", False)
            or getattr(parameter, "sequence_parallel", False)
        )
    ]


def sum_as_they_come(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sum every gradient of these over the tensor-parallel ranks, micro-batch by micro-batch.

    For an offloaded optimizer, which takes them to the host as they come. A tensor hook runs before
    the gradient is accumulated, so it is right for every ZeRO stage.
    """

    def reduce(gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=group)
        return gradient

    for parameter in parameters:
        parameter.register_hook(reduce)


def sum_at_once(sums: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum tensors over the tensor-parallel ranks in place, in one all-reduce. Collective.

    Of a whole step, or of the part of it that ZeRO leaves a rank, which tensor-parallel ranks cut
    alike: one all-reduce a step instead of one for each parameter and micro-batch, 7,000 of a few
    KB in a step of gpt3-175b with 192 micro-batches, each of which the backward pass waits for.
    """
    flat = torch.cat([tensor.flatten() for tensor in sums])
    dist.all_reduce(flat, group=group)
    for tensor, whole in zip(sums, flat.split([tensor.numel() for tensor in sums])):
        tensor.copy_(whole.view_as(tensor))
