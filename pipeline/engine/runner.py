"""What a step needs of whoever holds the numbers: the border between our arithmetic and a library.

    Engine: seeds, learning rate, token weights, verdict        what a step means
    Runner: parameters, gradients, optimizer state, schedule    where its numbers are, and when

`engine/deepspeed/plain.py` runs one stage (ZeRO 0 to 3), `engine/deepspeed/staged.py` a pipeline.
What DeepSpeed still does behind them: it partitions parameters, gradients and optimizer state over
the copies of the model, gathers and reduces them, and runs the pipeline's schedules. Norm,
clipping, the verdict on a step, the loss scale and the sums of gradients are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pipeline.config.run_shape import RunShape
    from pipeline.config.training import OptimizerConfig
    from pipeline.data.batch import Batch
    from pipeline.distributed.layout import ParallelLayout
    from pipeline.engine.loss_scale import LossScale
    from pipeline.model.architecture import Architecture
    from pipeline.model.gpt import Measure
    from pipeline.model.stage_io import StageSchema


@dataclass(frozen=True)
class Slot:
    """Where a run of one parameter lies in a flat fp32 tensor that the optimizer knows."""

    parameter: nn.Parameter
    flat: Tensor
    offset: int
    """First element in `flat`."""
    start: int
    """First element in the parameter, row-major."""
    numel: int


class Runner(Protocol):
    """A model and its optimizer on this rank. Methods are collective: call on every rank."""

    module: nn.Module
    """Its parameters' names become canonical by model/names.py."""
    optimizer: torch.optim.Optimizer
    """The one that does the arithmetic; its pre-hook hears of every update, and its kernel obeys
    grad_scale and found_inf (engine/verdict.py). Its param_groups hold the learning rates.
    """
    is_unsharded: bool
    """Whether every copy of the model holds and updates everything."""

    def set_micro_batches(self, count: int) -> None:
        """Steps from here on have `count` micro-batches."""

    def run(self, batches: Sequence[Batch], weights: Sequence[Tensor | None]) -> None:
        """Forward and backward passes of one step, reduction of its gradients, and the update.

        Args:
            batches: this rank's micro-batches.
            weights: of their tokens, (B, S) fp32; None: 1 / (B S) each.
        """

    def loss(self) -> Tensor:
        """0-dim mean over micro-batches and ranks of the step in `run`, once it went forward."""

    def grad_norm(self) -> Tensor:
        """0-dim fp32 norm of the step's whole reduced gradient, without the loss scale."""

    def evaluate(
        self, batches: Sequence[Batch], masks: Sequence[Tensor], measure: Measure, *, size: int = 2
    ) -> Tensor:
        """(size,) fp32 sums of a measure over micro-batches and all ranks, without gradients.

        Args:
            masks: (B, S) fp32 each, 1 where a token counts.
            measure: such as Loss.sums; gives `size` numbers of each micro-batch.
            size: how many.
        """

    def slots(self) -> Iterator[Slot]:
        """Where this rank's share of the trained fp32 weights lies."""

    def flats(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """The flat fp32 tensors that the optimizer knows, each with the parameters it is cut from.

        In an order that is the same on all ranks of a stage; a rank may hold nothing of a
        parameter.
        """

    def frozen_slots(self) -> Iterator[Slot]:
        """Where this rank's share of the frozen weights lies: the model's own memory."""

    def publish_weights(self) -> None:
        """Copy the fp32 weights into those that the model computes with."""


class RunnerClass(Protocol):
    """How a Runner is made: in two steps, between which its module gets its initial weights."""

    def build_module(
        self,
        architecture: Architecture,
        schema: StageSchema,
        shape: RunShape,
        layout: ParallelLayout,
    ) -> nn.Module:
        """This rank's share of the model. Collective."""

    def __call__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        *,
        optimizer: OptimizerConfig,
        architecture: Architecture,
        shape: RunShape,
        layout: ParallelLayout,
        loss_scale: LossScale | None,
    ) -> Runner:
        """The runner of a module with its initial weights. Collective.

        Args:
            module: from `build_module`.
            groups: of its parameters (engine/optimizer.py).
            loss_scale: of fp16; None: there is none.
        """
