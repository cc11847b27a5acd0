"""One stage: the whole model under DeepSpeed's plain engine, ZeRO 0 to 3."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from pipeline.config.choices import Precision
from pipeline.config.run_shape import RunShape
from pipeline.distributed.layout import ParallelLayout
from pipeline.engine.deepspeed import bf16_sums, fp32_sums
from pipeline.engine.deepspeed.base import BF16_SUMS, DeepSpeedRunner
from pipeline.engine.deepspeed.changes import total_norm
from pipeline.engine.deepspeed.mpu import Mpu
from pipeline.engine.deepspeed.reduction import Reduction
from pipeline.engine.forward_only import asking
from pipeline.model.architecture import Architecture
from pipeline.model.gpt import GPT, LossFunction, Measure
from pipeline.model.partition import is_expert, is_split
from pipeline.model.stage_io import StageSchema

if TYPE_CHECKING:
    from pipeline.data.batch import Batch


class PlainRunner(DeepSpeedRunner):
    """The Runner of pipeline_parallel_size 1."""

    mpu = Mpu()
    copies_nothing = "test_one_rank_copies_no_gradients"

    @staticmethod
    def build_module(
        architecture: Architecture, schema: StageSchema, shape: RunShape, layout: ParallelLayout
    ) -> nn.Module:
        """This tensor-parallel rank's model."""
        return GPT(architecture, layout.tensor.group)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As DeepSpeedRunner."""
        super().__init__(*args, **kwargs)
        has_peers = self.layout.tensor.size > 1
        self._experts = [p for p in self.parameters if is_expert(p)]
        self._split = [p for p in self.parameters if has_peers and is_split(p)]
        apart = set(map(id, self._experts + self._split))
        self._whole = [p for p in self.parameters if id(p) not in apart]
        is_fp32 = kwargs["architecture"].precision is Precision.fp32
        if isinstance(self.wrapper, BF16_Optimizer):
            self._sum_in_place(self.wrapper)
        elif is_fp32 and self.shape.zero_stage == 1 and not self.is_offloaded:
            sums = fp32_sums.flat_sums(self.wrapper)
            reduction = Reduction(sums, self.layout.replica.group, self.parameters, to_owners=True)
            fp32_sums.sum_in_place(self.wrapper, sums, reduction)

    def _sum_in_place(self, wrapper: BF16_Optimizer) -> None:
        """Of bf16: over one data-parallel rank nothing is reduced."""
        if self.layout.replica.size == 1:
            return bf16_sums.sum_in_place(wrapper, None)
        sums = bf16_sums.flat_sums(wrapper)
        reduction = Reduction(sums, self.layout.replica.group, self.parameters, to_owners=False)
        self._reduce_by(
            reduction.finish,
            why="reduces after the backward pass, through a copy",
            proof=f"{BF16_SUMS}::test_losses_and_norms_are_deepspeeds_own[all used]",
        )
        bf16_sums.sum_in_place(wrapper, reduction)

    def run(self, batches: Sequence[Batch], weights: Sequence[Tensor | None]) -> None:
        """Micro-batch by micro-batch; DeepSpeed reduces and updates at the last one."""
        self._loss, self._loss_sum = None, torch.zeros((), device=self.layout.device)
        for number, (batch, token_weights) in enumerate(
            zip(batches, weights, strict=True), start=1
        ):
            # DeepSpeed's own count runs over the whole run: a ramp of batch sizes would put its
            # step amid a batch.
            self.deepspeed.set_gradient_accumulation_boundary(number == len(batches))
            loss = self._forward(self.deepspeed, batch, token_weights)
            self.deepspeed.backward(loss)
            self._loss_sum += loss.detach()
            self.deepspeed.step()

    @staticmethod
    def _forward(
        model: nn.Module,
        batch: Batch,
        token_weights: Tensor | None,
        *,
        loss: LossFunction | None = None,
    ) -> Tensor:
        fields = (batch.tokens, batch.labels, token_weights, batch.document_ids, batch.positions)
        return model(*fields, batch.images, batch.patch_ids, loss=loss)

    def _mean_loss(self) -> Tensor:
        total = self._loss_sum / self._num_micro_batches
        if self.layout.replica.size > 1:
            dist.all_reduce(total, group=self.layout.replica.group)
        return total / self.layout.replica.size

    def grad_norm(self) -> Tensor:
        """0-dim fp32 norm; ours at ZeRO-0, where every copy has all gradients."""
        if not self.is_unsharded:
            return super().grad_norm()
        # |g|^2 = |whole parameters|^2, which every rank has alike and counts once, + the sums over
        # tensor-parallel ranks of |its parts|^2, and over expert-parallel ones of |its experts|^2.
        square = total_norm(_gradients(self._whole)).square()
        for apart, axis in (
            (self._split, self.layout.tensor),
            (self._experts, self.layout.expert),
        ):
            if apart:
                part = total_norm(_gradients(apart)).square()
                dist.all_reduce(part, group=axis.group)
                square += part
        return square.sqrt()

    def evaluate(
        self, batches: Sequence[Batch], masks: Sequence[Tensor], measure: Measure, *, size: int = 2
    ) -> Tensor:
        """(size,) sums of a measure over all ranks."""
        total = torch.zeros(size, device=self.layout.device)
        module: Any = self.module
        loss = partial(measure, module.loss)
        # Past DeepSpeed's engine, whose train() and eval() reach its module and not its own flag.
        with asking(self.module):
            for batch, mask in zip(batches, masks, strict=True):
                total += self._forward(self.module, batch, mask, loss=loss)
        dist.all_reduce(total, group=self.layout.replica.group)
        return total


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
