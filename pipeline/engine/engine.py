"""One optimizer step, at any layout.

    batches of one step -> forward, backward, reduce, clip, update -> StepResult

What a step means is decided here: its random streams, its learning rate, what each token weighs,
whether the update is applied. Who holds the numbers and when they move is the runner's business
(runner.py); every runner gives the same losses and gradient norms. The host launches a step and
reads nothing back: clipping and leaving a bad step out happen in the optimizer's kernel
(verdict.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config.choices import Float8, Precision
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.run_shape import RunShape
from pipeline.config.training import OptimizerConfig, ScheduleConfig
from pipeline.distributed.layout import ParallelLayout
from pipeline.distributed.random_streams import seed_step
from pipeline.engine import state
from pipeline.engine.counting import count_all, count_documents, loss_masks
from pipeline.engine.forward_only import Scores
from pipeline.engine.loss_scale import LossScale
from pipeline.engine.lr_schedule import lr_at
from pipeline.engine.muon import Muon
from pipeline.engine.optimizer import parameter_groups, set_lr
from pipeline.engine.own_runs import own_runs
from pipeline.engine.private import PrivateGradients
from pipeline.engine.runner import Runner, RunnerClass
from pipeline.engine.verdict import Verdict, decide_update
from pipeline.engine.weights import named_parameters, partition_of
from pipeline.model.architecture import Architecture
from pipeline.model.attention import pin_attention_kernels
from pipeline.model.documents import expect_documents
from pipeline.model.experts import set_moe_loss_scale, take_tallies
from pipeline.model.fragments import Fragment
from pipeline.model.gpt import Loss
from pipeline.model.initial_values import initialize, threads_for
from pipeline.model.lora import adapt, freeze
from pipeline.model.partition import Partition
from pipeline.model.stage_io import StageSchema
from pipeline.model.tensor_parallel import use_float8

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
    """A model that is trained step by step. Every method is collective: call on every rank."""

    def __init__(
        self,
        architecture: Architecture,
        schema: StageSchema,
        layout: ParallelLayout,
        *,
        runner_class: RunnerClass,
        shape: RunShape,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        finetune: FinetuneConfig,
        seed: int,
        noise_key: str = "",
    ) -> None:
        """Build this rank's stage, with its initial weights, and its optimizer.

        Args:
            runner_class: of whom holds the numbers at this layout.
            schedule: of the learning rate.
            finetune: which parameters are trained.
            seed: of the initial weights and of every step's random streams.
            noise_key: of a private run, its secret (training/privacy.py).
        """
        self.architecture, self.model = architecture, architecture.model
        self.shape, self.layout = shape, layout
        self._optimizer, self._schedule, self._seed = optimizer, schedule, seed
        pin_attention_kernels()
        module = runner_class.build_module(architecture, schema, shape, layout)
        adapt(module, self.model, finetune)
        if architecture.fp8 is Float8.rowwise:
            use_float8(module)
        module.to(layout.device)
        self.partitions = self._initial_weights(module)
        trained = list(freeze(named_parameters(module, self.model), self.model, finetune))
        is_fp16 = architecture.precision is Precision.fp16
        self.loss_scale = LossScale(layout.device) if is_fp16 else None
        self.runner: Runner = runner_class(
            module,
            parameter_groups(trained, optimizer, self.model),
            optimizer=optimizer,
            architecture=architecture,
            shape=shape,
            layout=layout,
            loss_scale=self.loss_scale,
        )
        if isinstance(self.runner.optimizer, Muon):
            # At ZeRO-0 every copy of the model has all gradients, and works for itself.
            self.runner.optimizer.join(
                state.linear_runs(self),
                layout.tensor if self.runner.is_unsharded else layout.stage,
                flats=[flat for flat, _ in self.runner.flats()],
                model=self.model,
            )
        self.private = self._private_gradients(finetune, noise_key)
        self.runner.optimizer.register_step_pre_hook(self._before_update)

    def _private_gradients(self, finetune: FinetuneConfig, key: str) -> PrivateGradients | None:
        """What makes the steps of a private run; None: the run is not private."""
        if finetune.dp.clip_norm is None:
            return None
        sequences = self.shape.at(0).global_batch_size
        named = self.all_parameters()
        return PrivateGradients(
            finetune.dp, self.runner, named, self.layout, sequences=sequences, key=key
        )

    @property
    def optimizer_name(self) -> str:
        """Whose state the fragments hold, as optimizer.name writes it."""
        return self._optimizer.name.name

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
        self._max_loss, self._step = max_loss, step
        self._verdict: Verdict | None = None
        self._set_micro_batches(len(batches))
        expect_documents(count_documents(batches))
        batches = own_runs(batches, self.layout.context, self.model)
        seed_step(self._seed, step, self.layout)
        lr = lr_at(
            step,
            lr=self._optimizer.lr,
            schedule=self._schedule,
            warmup_steps=self.shape.warmup_steps,
            total_steps=self.shape.total_steps,
        )
        set_lr(self.runner.optimizer, lr)
        if self.private is None:
            self.runner.run(batches, self._token_weights(batches))
        else:
            self.runner.run(*self.private.clipped(batches))
        assert self._verdict is not None, "the optimizer made no step"
        loss = self.runner.loss() if self.private is None else self.private.loss
        return StepResult(loss, self._verdict.grad_norm, lr, self._verdict.left_out)

    def _before_update(self, optimizer: Any, *_: Any) -> None:
        """Hand the step's verdict to the optimizer, once a step or once a parameter group."""
        verdict = self._verdict = self._verdict or self._judge()
        optimizer.grad_scale, optimizer.found_inf = verdict.grad_scale, verdict.left_out.float()
        if self.private is not None:  # behind the verdict, whose norm is that of the gradients
            self.private.add_noise(optimizer, self._step)

    def _judge(self) -> Verdict:
        """The step's verdict; in fp16 the loss scale hears of it too."""
        verdict = decide_update(
            self.runner.grad_norm(),
            clip_grad=self._optimizer.clip_grad,
            loss=self.runner.loss() if self._max_loss < math.inf else None,
            max_loss=self._max_loss,
            loss_scale=self.loss_scale.cur_scale.clone() if self.loss_scale else None,
        )
        if self.loss_scale:
            self.loss_scale.update(verdict.overflowed)
        return verdict

    def _token_weights(self, batches: Sequence[Batch]) -> list[Tensor | None]:
        """Weights that make the runner's mean over micro-batches and ranks the mean over tokens.

        A micro-batch's loss is sum(w * ce), the runner averages num_micro_batches * replicas of
        them: w = mask * num_micro_batches * replicas / (unmasked tokens of the global batch).
        """
        if all(batch.loss_mask is None for batch in batches):
            return [None] * len(batches)
        masks, count = loss_masks(batches, self.layout)
        scale = len(batches) * self.layout.replica.size / count.clamp(min=1.0)
        return [mask * scale for mask in masks]

    def _set_micro_batches(self, count: int) -> None:
        one = (
            torch.ones((), device=self.layout.device)
            if self.loss_scale is None
            else self.loss_scale.cur_scale
        )
        set_moe_loss_scale(one / count, context_ranks=self.layout.context.size)
        self.runner.set_micro_batches(count)

    def routing(self) -> Tensor:
        """(num_layers, num_experts + 2) fp64 sums of all ranks since the last call, in training.

        Tokens that each expert was sent, entropy of the tokens' choices in nats, tokens.
        """
        sums = take_tallies(
            self.runner.module,
            num_layers=self.model.num_layers,
            num_experts=self.model.moe.num_experts,
            device=self.layout.device,
        )
        # Every rank routes tokens of its own: under tensor parallelism the sequence is split.
        dist.all_reduce(sums)
        return sums

    # ---- evaluation ------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batches: list[Batch], *, answers: bool = False) -> Scores:
        """What these batches' unmasked tokens add up to; `answers`: their answers too."""
        expect_documents(count_documents(batches))
        count = count_all(batches, self.layout) if answers else None
        batches = own_runs(batches, self.layout.context, self.model)
        masks, tokens = loss_masks(batches, self.layout)
        measure = Loss.sums_and_exact if answers else Loss.sums
        return Scores.of(self.runner.evaluate(batches, masks, measure), tokens, count)

    @torch.no_grad()
    def next_logits(self, batch: Batch) -> Tensor:
        """(B, vocab_size) fp32 logits of what follows, in each row, the token that counts.

        Args:
            batch: the same on every rank; its loss_mask is 1 at one token of each row.
        """
        expect_documents(count_documents([batch]))
        (own,) = own_runs([batch], self.layout.context, self.model)
        assert own.loss_mask is not None
        size = len(own.tokens) * self.shape.padded_vocab_size
        sums = self.runner.evaluate([own], [own.loss_mask], Loss.next_logits, size=size)
        # Every copy of the model has added its own.
        logits = sums.view(len(own.tokens), -1) / self.layout.replica.size
        return logits[:, : self.shape.vocab_size]

    @torch.no_grad()
    def row_losses(self, batch: Batch) -> Tensor:
        """(B,) fp32 sums of the cross entropy of each row's unmasked tokens.

        Args:
            batch: the same on every data-parallel rank.
        """
        expect_documents(count_documents([batch]))
        (own,) = own_runs([batch], self.layout.context, self.model)
        masks, _ = loss_masks([own], self.layout)
        size = len(own.tokens)
        sums = self.runner.evaluate([own], masks, Loss.row_sums, size=size)
        # Every copy of the model has added its own; ranks that share sequences, their runs of them.
        return sums / self.layout.data.size

    # ---- parameters ------------------------------------------------------------------------------

    def all_parameters(self) -> dict[str, tuple[nn.Parameter, Partition]]:
        """Canonical name -> (parameter, its partition) of this stage, tied copies included."""
        return {
            name: (parameter, self.partitions[name])
            for name, parameter in named_parameters(self.runner.module, self.model)
        }

    def fragments(self) -> list[Fragment]:
        """Views of all weights of this rank, the trained ones in fp32 with optimizer state."""
        return [*state.fragments(self), *state.frozen_fragments(self)]

    def publish_weights(self) -> None:
        """Copy the views' fp32 weights into those that the model computes with. Collective."""
        self.runner.publish_weights()

    def _initial_weights(self, module: nn.Module) -> dict[str, Partition]:
        """Fill the parameters of this rank's stage; which part of the whole each of them is."""
        partitions = {}
        num_threads = threads_for(self.layout.ranks.local_world_size)
        for name, parameter in named_parameters(module, self.model):
            part = partition_of(name, parameter, self.layout, vocab_size=self.shape.vocab_size)
            initialize(
                parameter, name, part, model=self.model, seed=self._seed, num_threads=num_threads
            )
            partitions[name] = part
        return partitions
