"""Low-rank matrices beside the linears of the blocks, and which parameters are frozen (LoRA).

    adapt(module) -> lora_a, lora_b in each target;  freeze(parameters) -> the trained ones

A target computes W x + alpha / rank * B (A x) (Hu et al. 2021, arXiv:2106.09685), with A (rank,
in), B (out, rank). Only activations of width `rank` travel:

    linear  A                     B                    travels                   partial gradient
    column  whole                 split as W's rows    copy, SP: gather of A x   SP: A
    row     split as W's columns  whole                sum, SP: scattered, of A x   SP: B
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor, nn
from torch.autograd import Function

from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig
from pipeline.config.parameter_names import lora_stems, matches
from pipeline.model.names import canonical_name
from pipeline.model.partition import mark_split


class LowRank:
    """What a parallel linear, an nn.Module, adds to W x; nothing before `add_low_rank`."""

    weight: Any
    tp_group: Any
    sequence_parallel: Any
    lora_scale: float = 0.0

    def add_low_rank(self, *, rank: int, alpha: float, is_column: bool) -> None:
        """Give the linear its matrices, on the device of its weight; their values come later."""
        rows, columns = self.weight.shape
        self.lora_a = nn.Parameter(torch.zeros(rank, columns, device=self.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(rows, rank, device=self.weight.device))
        self.lora_scale = alpha / rank
        if is_column:
            whole = self.lora_a
            mark_split(self.lora_b, 0, vars(self.weight).get("partition_stride", 1))
        else:
            whole = self.lora_b
            mark_split(self.lora_a, 1, 1)
        # The whole one sees this rank's slice of the sequence only.
        vars(whole)["has_partial_gradient"] = bool(self.sequence_parallel)

    def plus_low_rank(self, out: Tensor, x: Tensor) -> Tensor:
        """`out`, which is W x, + alpha / rank * B (A x)."""
        narrow = F.linear(x, self.lora_a)
        if self.tp_group.size() > 1:
            narrow = self.exchange(narrow)
        # Scaled where it is narrow: behind B that would be a pass over the whole output, twice.
        return _PlusWide.apply(out, narrow * self.lora_scale, self.lora_b)

    def exchange(self, narrow: Tensor) -> Tensor:
        """A x, whole, where B needs it."""
        raise NotImplementedError


class _PlusWide(Function):
    """out + narrow B^T, and the gradients of narrow and B as products with few rows."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, narrow: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(narrow, b)
        # One product on top of `out`, instead of a product as wide as it and a sum.
        return torch.addmm(out.flatten(0, -2), narrow.flatten(0, -2), b.t()).view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        narrow, b = ctx.saved_tensors
        wide, of_narrow, of_b = grad.flatten(0, -2), None, None
        # d narrow = g B and dB = g^T narrow have `rank` columns, for which torch's CPU products are
        # slow: 8 columns of 768 x 768 took 0.68 and 0.80 ms, the same numbers as 8 rows 0.16 and
        # 0.15 ms, where W's own product takes 1.8 ms. Contiguous, as megatron-core's all-reduce
        # of a gradient that is not would be lost.
        if ctx.needs_input_grad[1]:
            of_narrow = (b.t() @ wide.t()).t().contiguous().view_as(narrow)
        if ctx.needs_input_grad[2]:
            of_b = (narrow.flatten(0, -2).t() @ wide).t().contiguous()
        return grad, of_narrow, of_b


class LowRankColumn(LowRank):
    """Of a linear whose rows are split."""

    def exchange(self, narrow: Tensor) -> Tensor:
        """The same everywhere already; behind A, not before it, so that A's gradient is whole."""
        if self.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(narrow)
        return tensor_parallel.copy_to_tensor_model_parallel_region(narrow)


class LowRankRow(LowRank):
    """Of a linear whose columns are split."""

    def exchange(self, narrow: Tensor) -> Tensor:
        """The sum over the columns' parts."""
        if self.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(narrow)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(narrow)


def adapt(module: nn.Module, model: ModelConfig, finetune: FinetuneConfig) -> None:
    """Add the low-rank matrices to the targets of this rank's part of a model."""
    targets = set(lora_stems(model, finetune))
    for name, part in module.named_modules():
        if canonical_name(name, num_layers=model.num_layers) in targets:
            assert isinstance(part, LowRank), name
            part.add_low_rank(
                rank=finetune.lora_rank,
                alpha=finetune.lora_alpha,
                is_column=isinstance(part, LowRankColumn),
            )


def freeze(
    named: Iterable[tuple[str, nn.Parameter]], model: ModelConfig, finetune: FinetuneConfig
) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained ones of (canonical name, parameter); the others ask for no gradient any more."""
    for name, parameter in named:
        parameter.requires_grad_(matches(name, finetune.train, model))
        if parameter.requires_grad:
            yield name, parameter
