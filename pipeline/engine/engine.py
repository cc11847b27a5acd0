"""DeepSpeed owns the optimizer step; this file owns DeepSpeed.

    batches of one step -> forward, backward, reduce, clip, update -> StepResult

pipeline_parallel_size 1: DeepSpeed's plain engine, ZeRO 0 to 3. Above: its PipelineModule with
ZeRO-1, under the 1F1B or the DualPipeV schedule. Both give the same losses and gradient norms;
`Engine` hides which one runs. Every DeepSpeed key that matters is written in `deepspeed_config`:
its defaults have changed between releases. The host launches a step and reads nothing back:
clipping and leaving a bad step out happen in the optimizer's kernel (verdict.py).
"""

from __future__ import annotations

import pipeline.engine.deepspeed.environment  # noqa: F401

# isort: split
import math
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from pipeline.config.choices import Precision
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape
from pipeline.config.training import OptimizerConfig
from pipeline.distributed.layout import ParallelLayout
from pipeline.distributed.random_streams import seed_step
from pipeline.engine import optimizer as optimizer_module
from pipeline.engine.deepspeed.bf16_sums import Reduction, sum_in_place
from pipeline.engine.deepspeed.changes import (
    HostAdam,
    is_split,
    keep_decisions_on_device,
    reduce_tied_sums,
)
from pipeline.engine.deepspeed.mpu import Mpu
from pipeline.engine.deepspeed.settings import deepspeed_config
from pipeline.engine.deepspeed.staged import micro_batch_stream, pipeline_module
from pipeline.engine.loss_scale import LossScale
from pipeline.engine.lr_schedule import lr_at
from pipeline.engine.verdict import Verdict, decide_update
from pipeline.errors import ConfigError
from pipeline.model.architecture import Architecture
from pipeline.model.attention import pin_attention_kernels
from pipeline.model.block import set_moe_loss_scale
from pipeline.model.gpt import GPT
from pipeline.model.initial_values import initialize
from pipeline.model.names import canonical_name
from pipeline.model.partition import Partition
from pipeline.model.stage_io import StageSchema
from pipeline.model.tensor_parallel import reduce_partial_gradients

if TYPE_CHECKING:
    from pipeline.data.batch import Batch


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. Tensors stay on the device until a logging step reads them."""

    loss: Tensor
    """0-dim fp32: mean over the tokens of the global batch."""
    grad_norm: Tensor
    """0-dim fp32: global gradient norm before clipping; not finite where a gradient was not."""
    lr: float
    skipped: Tensor
    """0-dim bool: the update was left out, for a gradient that was not finite or a loss above
    train_step's max_loss.
    """


class Engine:
    """One interface over DeepSpeed's engines. Every method is collective: call on every rank."""

    def __init__(self, cfg: PretrainConfig, shape: RunShape, layout: ParallelLayout) -> None:
        self.cfg, self.shape, self.layout = cfg, shape, layout
        self.is_pipeline = shape.sizes.pipeline > 1
        if (
            cfg.training.precision is Precision.fp16
            and not deepspeed.accelerator.get_accelerator().is_fp16_supported()
        ):
            raise ConfigError(
                "training.precision=fp16 is not supported on this device. "
                "Set training.precision=bf16 or fp32."
            )
        pin_attention_kernels()
        # Takes over torch's process group.
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        self.architecture = Architecture(
            cfg.model, cfg.parallel, cfg.training, shape.vocab_size, shape.padded_vocab_size
        )
        self.stage_schema = StageSchema.of(cfg.data, cfg.parallel)
        module = self._module().to(layout.device)
        self.partitions = self._initial_weights(module)
        reduce_partial_gradients(module, layout.tensor.group)
        groups = optimizer_module.parameter_groups(self._named(module), cfg.optimizer, cfg.model)
        self._num_micro_batches = shape.at(0).num_micro_batches
        self._activation_shape: tuple[int, ...] = ()
        with redirect_stdout(StringIO()):  # DeepSpeed prints its memory, line upon line
            self.deepspeed, *_ = deepspeed.initialize(
                model=module,
                model_parameters=groups,
                optimizer=self._optimizer(cfg.optimizer),
                config=deepspeed_config(cfg, shape),
                mpu=None if self.is_pipeline else Mpu(),
            )
        self._all_parameters = list(module.parameters())
        has_peers = shape.sizes.tensor > 1
        self._split_parameters = [p for p in self._all_parameters if has_peers and is_split(p)]
        self._whole_parameters = [
            p for p in self._all_parameters if not (has_peers and is_split(p))
        ]
        self.loss_scale = (
            LossScale(layout.device) if cfg.training.precision is Precision.fp16 else None
        )
        self._adapt_deepspeed()
        self.optimizer.register_step_pre_hook(self._before_update)

    def _adapt_deepspeed(self) -> None:
        wrapper, is_offloaded = self.deepspeed.optimizer, self.cfg.parallel.offload_optimizer
        keep_decisions_on_device(wrapper, self.loss_scale, is_offloaded=is_offloaded)
        if self.is_unsharded:
            self.deepspeed.zero_grad = self._forget_gradients
        if self.loss_scale and self.is_pipeline:
            reduce_tied_sums(self.deepspeed)
        reduction = None
        if self.shape.sizes.data == 1:
            # The sum over one rank: DeepSpeed would copy every gradient into a bucket and back.
            self.deepspeed.buffered_allreduce_fallback = lambda *_, **__: None
        if isinstance(wrapper, BF16_Optimizer) and not self.is_pipeline:
            if self.shape.sizes.data > 1:
                reduction = Reduction(wrapper, self.layout.data.group, self._all_parameters)
                self.deepspeed.buffered_allreduce_fallback = lambda *_, **__: reduction.finish()
            sum_in_place(wrapper, reduction)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that does the arithmetic, under DeepSpeed's wrapper where there is one."""
        wrapper = self.deepspeed.optimizer
        return wrapper if isinstance(wrapper, torch.optim.Optimizer) else wrapper.optimizer

    # ---- one optimizer step ----------------------------------------------------------------------

    def train_step(
        self, batches: list[Batch], *, step: int, max_loss: float = math.inf
    ) -> StepResult:
        """Forward, backward and update on this rank's micro-batches of optimizer step `step`.

        Args:
            batches: num_micro_batches of them.
            step: 0 is the first.
            max_loss: the update is left out when the step's loss is above.
        """
        self._max_loss = max_loss
        self._loss: Tensor | None = None
        self._verdict: Verdict | None = None
        self._set_micro_batches(len(batches))
        seed_step(self.cfg.seed, step, self.layout)
        lr = lr_at(
            step,
            lr=self.cfg.optimizer.lr,
            schedule=self.cfg.schedule,
            warmup_steps=self.shape.warmup_steps,
            total_steps=self.shape.total_steps,
        )
        optimizer_module.set_lr(self.deepspeed.optimizer, lr)
        weights = self._token_weights(batches)
        loss = (
            self._pipeline_step(batches, weights)
            if self.is_pipeline
            else self._plain_step(batches, weights)
        )
        assert self._verdict is not None, "the optimizer made no step"
        return StepResult(loss, self._verdict.grad_norm, lr, self._verdict.left_out)

    def _plain_step(self, batches: list[Batch], weights: list[Tensor | None]) -> Tensor:
        if not self.deepspeed.training:
            self.deepspeed.train()
        self._loss_sum = torch.zeros((), device=self.layout.device)
        for number, (batch, token_weights) in enumerate(
            zip(batches, weights, strict=True), start=1
        ):
            # DeepSpeed's own count runs over the whole run: a ramp of batch sizes would put its
            # step amid a batch.
            self.deepspeed.set_gradient_accumulation_boundary(number == len(batches))
            loss = self.deepspeed(
                batch.tokens, batch.labels, token_weights, batch.document_ids, batch.positions
            )
            self.deepspeed.backward(loss)
            self._loss_sum += loss.detach()
            self.deepspeed.step()
        return self._step_loss()

    def _step_loss(self) -> Tensor:
        """Mean loss of the step, after its last forward pass."""
        if self._loss is None:
            self._loss = (
                self.deepspeed._aggregate_total_loss()
                if self.is_pipeline
                else self._mean_over_ranks()
            )
        return self._loss

    def _mean_over_ranks(self) -> Tensor:
        total = self._loss_sum / self._num_micro_batches
        if self.layout.data.size > 1:
            dist.all_reduce(total, group=self.layout.data.group)
        return total / self.layout.data.size

    def _before_update(self, optimizer: Any, *_: Any) -> None:
        """Hand the step's verdict to the optimizer, once a step or once a parameter group."""
        verdict = self._verdict = self._verdict or self._judge()
        optimizer.grad_scale, optimizer.found_inf = verdict.grad_scale, verdict.left_out.float()

    def _judge(self) -> Verdict:
        verdict = decide_update(
            self._whole_norm() if self.is_unsharded else self.deepspeed.optimizer._global_grad_norm,
            clip_grad=self.cfg.optimizer.clip_grad,
            loss=self._step_loss() if self._max_loss < math.inf else None,
            max_loss=self._max_loss,
            loss_scale=self.loss_scale.cur_scale.clone() if self.loss_scale else None,
        )
        if self.loss_scale:
            self.loss_scale.update(verdict.overflowed)
        return verdict

    def _pipeline_step(self, batches: list[Batch], weights: list[Tensor | None]) -> Tensor:
        self._expect_shape(batches[0])
        return self.deepspeed.train_batch(micro_batch_stream(batches, weights, self.stage_schema))

    def _token_weights(self, batches: list[Batch]) -> list[Tensor | None]:
        """Weights that make the engine's mean over micro-batches and ranks the mean over tokens.

        A micro-batch's loss is sum(w * ce), the engine averages num_micro_batches *
        data_parallel_size of them: w = mask * num_micro_batches * data_parallel_size / (unmasked
            tokens of the global batch).
        """
        if all(batch.loss_mask is None for batch in batches):
            return [None] * len(batches)
        masks = [
            torch.ones_like(b.labels, dtype=torch.float32) if b.loss_mask is None else b.loss_mask
            for b in batches
        ]
        count = torch.stack([mask.sum() for mask in masks]).sum()
        dist.all_reduce(count, group=self.layout.data.group)
        scale = len(batches) * self.layout.data.size / count.clamp(min=1.0)
        return [mask * scale for mask in masks]

    def _set_micro_batches(self, count: int) -> None:
        one = (
            torch.ones((), device=self.layout.device)
            if self.loss_scale is None
            else self.loss_scale.cur_scale
        )
        set_moe_loss_scale(one / count)
        if count != self._num_micro_batches:
            self._num_micro_batches = count
            self.deepspeed.set_train_batch_size(
                self.shape.micro_batch_size * count * self.layout.data.size
            )
            # read where gradients are offloaded
            self.deepspeed.optimizer.gradient_accumulation_steps = count

    @property
    def is_unsharded(self) -> bool:
        """Whether DeepSpeed runs the optimizer as it is, at ZeRO-0."""
        return self.optimizer is self.deepspeed.optimizer

    def _forget_gradients(self) -> None:
        # DeepSpeed walks the module tree for their names: 0.3 ms a step at 4 layers.
        for parameter in self._all_parameters:
            parameter.grad = None

    def _whole_norm(self) -> Tensor:
        """Gradient norm at ZeRO-0, where every data-parallel rank has all gradients."""
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self._whole_parameters if p.grad is not None]
        )
        if not self._split_parameters:
            return norm
        split = torch.nn.utils.get_total_norm(
            [p.grad for p in self._split_parameters if p.grad is not None]
        ).square()
        dist.all_reduce(split, group=self.layout.tensor.group)
        return (split + norm.square()).sqrt()

    # ---- evaluation ------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> tuple[Tensor, Tensor]:
        """(summed cross entropy, number) of these batches' unmasked tokens on all ranks."""
        masks = [
            torch.ones_like(b.labels, dtype=torch.float32) if b.loss_mask is None else b.loss_mask
            for b in batches
        ]
        count = torch.stack([mask.sum() for mask in masks]).sum()
        dist.all_reduce(count, group=self.layout.data.group)
        if self.is_pipeline:
            return self._pipeline_evaluate(batches, masks), count
        self.deepspeed.eval()
        total = torch.zeros((), device=self.layout.device)
        for batch, mask in zip(batches, masks, strict=True):
            total += self.deepspeed(
                batch.tokens, batch.labels, mask, batch.document_ids, batch.positions
            )
        dist.all_reduce(total, group=self.layout.data.group)
        return total, count

    def _pipeline_evaluate(self, batches: list[Batch], masks: list[Tensor]) -> Tensor:
        self._expect_shape(batches[0])
        # DualPipeV needs that many in flight.
        missing = max(0, 2 * self.shape.sizes.pipeline - len(batches))
        weights: list[Tensor | None] = [*masks, *[torch.zeros_like(masks[0])] * missing]
        batches = [*batches, *[batches[0]] * missing]
        mean = self.deepspeed.eval_batch(
            micro_batch_stream(batches, weights, self.stage_schema), num_micro_batches=len(batches)
        )
        return mean.reshape(()) * (len(batches) * self.layout.data.size)

    # ---- parameters ------------------------------------------------------------------------------

    def parameters(self) -> dict[str, tuple[nn.Parameter, Partition]]:
        """Canonical name -> (parameter, its partition) of this stage, a tied one once."""
        return {
            name: (parameter, self.partitions[name])
            for name, parameter in self._named(self.deepspeed.module)
            if not getattr(parameter, "ds_pipe_replicated", False)
        }

    def all_parameters(self) -> dict[str, tuple[nn.Parameter, Partition]]:
        """As `parameters`, with tied copies."""
        return {
            name: (parameter, self.partitions[name])
            for name, parameter in self._named(self.deepspeed.module)
        }

    def _named(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        num_layers = self.cfg.model.num_layers
        return [
            (canonical_name(name, num_layers=num_layers), p)
            for name, p in module.named_parameters()
        ]

    def _initial_weights(self, module: nn.Module) -> dict[str, Partition]:
        partitions = {}
        for name, parameter in self._named(module):
            is_vocabulary = name in ("embedding.word.weight", "head.weight")
            partitions[name] = Partition.of(
                tuple(parameter.shape),
                dim=getattr(parameter, "partition_dim", None) if is_split(parameter) else None,
                stride=getattr(parameter, "partition_stride", 1),
                tensor_rank=self.layout.tensor.rank,
                tensor_size=self.layout.tensor.size,
                real_size=self.shape.vocab_size if is_vocabulary else None,
            )
            initialize(parameter, name, partitions[name], model=self.cfg.model, seed=self.cfg.seed)
        return partitions

    # ---- construction ----------------------------------------------------------------------------

    def _module(self) -> nn.Module:
        if not self.is_pipeline:
            return GPT(self.architecture, self.layout.tensor.group)
        with redirect_stdout(StringIO()):  # DeepSpeed prints its topology
            return pipeline_module(self.architecture, self.stage_schema, self.shape, self.layout)

    def _optimizer(self, cfg: OptimizerConfig) -> Any:
        if self.cfg.parallel.offload_optimizer:
            return lambda groups: HostAdam(
                groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, adamw_mode=True
            )
        return lambda groups: optimizer_module.build(groups, cfg)

    def _expect_shape(self, batch: Batch) -> None:
        shape = tuple(batch.tokens.shape)
        if self._activation_shape not in ((), shape):
            self.deepspeed.reset_activation_shape()
        self._activation_shape = shape
