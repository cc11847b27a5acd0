"""Differentially private steps: each sequence's gradient clipped, noise on their sum.

    micro-batches --a sequence at a time--> gradient norm of each -> clip_norm / norm, at most 1
    those as weights of the sequences' tokens -> an ordinary step -> mean of clipped gradients
    + noise of the parameter's canonical name, the step and the salt -> the optimizer

Two passes, so that whoever holds the numbers reduces and partitions as ever: the second one is the
step that every runner makes, and what it sums is sum_i min(1, C / |g_i|) g_i. The first leaves
nothing behind: torch.autograd.grad accumulates nowhere. Noise is drawn for whole parameters, and a
rank adds its own part, so that it is the same at every layout. A sequence without a finite gradient
is left out of its step, or the step would be left out: that one is missing tells of the sequence
without any noise.
Source: Abadi et al. 2016, arXiv:1607.00133; two passes: Lee & Kifer 2021, arXiv:2009.03106.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config.finetune import PrivacyConfig
from pipeline.distributed.layout import ParallelLayout
from pipeline.engine.counting import loss_mask_of
from pipeline.engine.runner import Runner
from pipeline.engine.secret_noise import secret_normal
from pipeline.model.partition import Partition, is_shared
from pipeline.model.tensor_parallel import partial_parameters, sum_at_once

if TYPE_CHECKING:
    from pipeline.data.batch import Batch


class PrivateGradients:
    """What a private step does beside an ordinary one."""

    def __init__(
        self,
        cfg: PrivacyConfig,
        runner: Runner,
        parameters: Mapping[str, tuple[nn.Parameter, Partition]],
        layout: ParallelLayout,
        *,
        sequences: int,
        key: str,
    ) -> None:
        """Get ready.

        Args:
            parameters: canonical name to parameter and partition, of this rank.
            sequences: of the global batch, at every step.
            key: secret of the run, from which its noise is drawn; whoever knows it can take the
                noise away.
        """
        assert cfg.clip_norm is not None
        self._clip_norm, self._key = cfg.clip_norm, key
        self._std = cfg.noise_multiplier * cfg.clip_norm / sequences
        self._runner, self._layout = runner, layout
        self._trained = [p for p, _ in parameters.values() if p.requires_grad]
        self._named = {id(p): (name, part) for name, (p, part) in parameters.items()}
        partial = partial_parameters(runner.module) if layout.tensor.size > 1 else []
        # Where ZeRO takes gradients apart, a hook of the parameter has summed them already.
        self._partial = {id(p) for p in partial if not p._backward_hooks}
        self.loss = torch.zeros((), device=layout.device)
        """0-dim: mean over the last step's sequences with finite gradients of the mean over their
        tokens.
        """
        self.salt = ""
        """Known to all: steps of one number and salt add the same noise, so that they must be the
        same step. Set before the first one.
        """

    def clipped(self, batches: Sequence[Batch]) -> tuple[list[Batch], list[Tensor]]:
        """Micro-batches and (B, S) weights of their tokens, for a mean of clipped gradients.

        A sequence's loss is the mean over its own unmasked tokens: were it divided by those of the
        batch, its gradient would depend on what else is in the batch. Collective.
        """
        found = [self._measure(_row(b, row)) for b in batches for row in range(len(b.tokens))]
        losses, squares = (torch.stack(column) for column in zip(*found))
        # Split parameters' squares add up over the tensor-parallel ranks, whole ones count once.
        split = squares[:, 1].contiguous()
        if self._layout.tensor.size > 1:
            dist.all_reduce(split, group=self._layout.tensor.group)
        norms = (squares[:, 0] + split).sqrt()
        is_sound = norms.isfinite() & losses.isfinite()
        self.loss = self._mean(losses, is_sound)
        factors = torch.where(is_sound, self._clip_norm / norms.clamp(min=self._clip_norm), 0.0)
        kept, weights, at = [], [], 0
        for batch in batches:
            mask = loss_mask_of(batch)
            mean = mask / mask.sum(1, keepdim=True).clamp(min=1.0)
            rows = slice(at, at := at + len(mask))
            weights.append(factors[rows, None] * mean / len(mask))
            # Zero times infinity is no number: what is left out is not computed either.
            tokens = torch.where(is_sound[rows, None], batch.tokens, 0)
            kept.append(replace(batch, tokens=tokens))
        return kept, weights

    def _mean(self, losses: Tensor, counts: Tensor) -> Tensor:
        """0-dim: mean over all replicas of the losses that count. Collective."""
        sums = torch.stack([torch.where(counts, losses, 0.0).sum(), counts.sum()])
        if (axis := self._layout.replica).size > 1:
            dist.all_reduce(sums, group=axis.group)
        return sums[0] / sums[1]

    def _measure(self, row: Batch) -> tuple[Tensor, Tensor]:
        """(loss, (2,) squared norms of whole and of split parameters' gradients) of a sequence."""
        mask = loss_mask_of(row)
        module: Any = self._runner.module
        weights = mask / mask.sum().clamp(min=1.0)
        fields = (row.tokens, row.labels, weights, row.document_ids, row.positions)
        loss = module(*fields)
        found = torch.autograd.grad(loss, self._trained, allow_unused=True)
        pairs = [(p, g.float()) for p, g in zip(self._trained, found) if g is not None]
        if summed := [g for p, g in pairs if id(p) in self._partial]:
            sum_at_once(summed, self._layout.tensor.group)
        squares = torch.zeros(2, device=loss.device)
        for parameter, gradient in pairs:
            squares[0 if is_shared(parameter) else 1] += gradient.square().sum()
        return loss.detach(), squares

    @torch.no_grad()
    def add_noise(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Add this step's noise to the gradients that the optimizer is about to use."""
        assert self.salt, "nobody has said which noise"
        purpose = f"{self.salt}/{step}"
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for slot in self._runner.slots():
            if id(slot.flat) not in held:
                continue  # DeepSpeed updates a parameter group at a time
            name, part = self._named[id(slot.parameter)]
            noise = secret_normal(name, part, key=self._key, purpose=purpose).flatten()
            run = noise[slot.start : slot.start + slot.numel]
            gradient = slot.flat.grad
            assert gradient is not None, name
            into = gradient.view(-1)[slot.offset : slot.offset + slot.numel]
            into.add_(run.to(into), alpha=self._std)


def _row(batch: Batch, row: int) -> Batch:
    """One sequence of a micro-batch, as a micro-batch."""
    cut: dict[str, Any] = {
        field.name: value[row : row + 1]
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor | np.ndarray)
    }
    return replace(batch, **cut)
