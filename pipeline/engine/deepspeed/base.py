"""What DeepSpeed's two engines have in common: set-up, changes, slots."""

from __future__ import annotations

import pipeline.engine.deepspeed.environment  # noqa: F401

# isort: split
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from pipeline.config.choices import Precision
from pipeline.config.run_shape import RunShape
from pipeline.config.training import OptimizerConfig
from pipeline.distributed.layout import ParallelLayout
from pipeline.engine import optimizer as optimizer_module
from pipeline.engine.deepspeed import slots
from pipeline.engine.deepspeed.changes import HostAdam, keep_decisions_on_device
from pipeline.engine.deepspeed.experts import announce_experts
from pipeline.engine.deepspeed.operators import load_host_adam
from pipeline.engine.deepspeed.settings import deepspeed_config
from pipeline.engine.loss_scale import LossScale
from pipeline.engine.runner import Slot
from pipeline.model.architecture import Architecture
from pipeline.model.tensor_parallel import partial_parameters, sum_as_they_come, sum_at_once
from pipeline.patching import replace

BF16_SUMS = "tests/engine/deepspeed/test_bf16_sums.py"


class DeepSpeedRunner:
    """A module under deepspeed.initialize, its decisions left to engine/verdict.py."""

    mpu: Any = None
    """The groups DeepSpeed asks for; None: the module brings them."""
    copies_nothing: str
    """The test that one rank's gradients are not reduced at all."""

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        *,
        optimizer: OptimizerConfig,
        architecture: Architecture,
        shape: RunShape,
        layout: ParallelLayout,
        loss_scale: LossScale | None,
    ) -> None:
        """Partition parameters and build the optimizer; arguments as of RunnerClass. Collective."""
        self.module, self.shape, self.layout = module, shape, layout
        settings = deepspeed_config(architecture, shape)
        self.is_offloaded = architecture.parallel.offload_optimizer
        self._num_micro_batches = settings["gradient_accumulation_steps"]
        self._loss: Tensor | None = None
        announce_experts(module, layout)
        self.deepspeed, *_ = deepspeed.initialize(
            model=module,
            model_parameters=groups,
            optimizer=_optimizer(optimizer, architecture.precision, self.is_offloaded),
            config=settings,
            mpu=self.mpu,
        )
        self.wrapper = self.deepspeed.optimizer
        self.is_unsharded = isinstance(self.wrapper, torch.optim.Optimizer)
        self.optimizer: torch.optim.Optimizer = (
            self.wrapper if self.is_unsharded else self.wrapper.optimizer
        )
        self.parameters = list(module.parameters())
        self._partial = partial_parameters(module) if layout.tensor.size > 1 else []
        if self.is_offloaded:  # their sums are the host's, which has no such ranks under NCCL
            sum_as_they_come(self._partial, layout.tensor.group)
            self._partial = []
        keep_decisions_on_device(
            self.wrapper,
            loss_scale,
            partial_parameters=self._partial,
            layout=layout,
            is_offloaded=self.is_offloaded,
        )
        if not (self.is_unsharded or isinstance(self.wrapper, BF16_Optimizer)):
            self._partial = []  # of ZeRO, where only its own sums hold them
        self._reduce_no_more_than_needed()

    def _reduce_no_more_than_needed(self) -> None:
        """Over data-parallel ranks where there are any, then over tensor-parallel ones."""
        if self.shape.sizes.replicas == 1:
            self._reduce_by(
                lambda: None,
                why="copies every gradient to sum it over one rank",
                proof=f"{BF16_SUMS}::{self.copies_nothing}",
            )
        elif self._partial and self.is_unsharded:
            self._reduce_by(
                self.deepspeed.buffered_allreduce_fallback,
                why="does not know of sums over the tensor-parallel ranks",
                proof="tests/engine/deepspeed/test_base.py::"
                "test_parts_of_gradients_are_summed_in_one_all_reduce_a_step[first]",
            )

    def _reduce_by(self, reduce: Callable[[], None], *, why: str, proof: str) -> None:
        """Let `reduce` reduce a step's gradients, where DeepSpeed would after its last one.

        Then those of which tensor-parallel ranks have parts are summed over them.
        """

        def reduce_all(*_: Any, **__: Any) -> None:
            reduce()
            if self._partial:
                sum_at_once(self._partial_sums(), self.layout.tensor.group)

        replace(
            self.deepspeed,
            "buffered_allreduce_fallback",
            reduce_all,
            why=why,
            upstream="not reported",
            proof=proof,
        )

    def _partial_sums(self) -> list[Tensor]:
        """This step's gradients of the partial parameters, alike on all tensor-parallel ranks."""
        if self.is_unsharded:
            return [p.grad for p in self._partial if p.grad is not None]
        chosen = set(map(id, self._partial))
        return [
            gradient
            for members, gradients in zip(
                self.wrapper.bf16_groups, self.wrapper.fp32_groups_gradients, strict=True
            )
            for member, gradient in zip(members, gradients, strict=True)
            if id(member) in chosen
        ]

    def set_micro_batches(self, count: int) -> None:
        """Steps from here on have `count` micro-batches."""
        if count == self._num_micro_batches:
            return
        self._num_micro_batches = count
        self.deepspeed.set_train_batch_size(
            self.shape.micro_batch_size * count * self.layout.replica.size
        )

    def loss(self) -> Tensor:
        """0-dim mean loss of the step; the ranks add up once, for verdict and result."""
        if self._loss is None:
            self._loss = self._mean_loss()
        return self._loss

    def _mean_loss(self) -> Tensor:
        raise NotImplementedError

    def grad_norm(self) -> Tensor:
        """0-dim fp32 norm of the step's whole gradient."""
        return self.wrapper._global_grad_norm

    def slots(self) -> Iterator[Slot]:
        """Where this rank's share of the trained fp32 weights lies."""
        return slots.find_slots(self.wrapper, self.parameters)

    def flats(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """The flat fp32 tensors that the optimizer knows, each with its parameters."""
        return slots.find_flats(self.wrapper, self.parameters)

    def frozen_slots(self) -> Iterator[Slot]:
        """Where this rank's share of the frozen weights lies: the model's own memory."""
        return slots.find_frozen_slots(self.parameters)

    @torch.no_grad()
    def publish_weights(self) -> None:
        """Copy the fp32 weights into those that the model computes with."""
        slots.publish_weights(self.wrapper)


def _optimizer(cfg: OptimizerConfig, precision: Precision, is_offloaded: bool) -> Any:
    if is_offloaded:
        load_host_adam()
        return lambda groups: HostAdam(
            groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, adamw_mode=True
        )
    return lambda groups: optimizer_module.build(groups, cfg, precision)
