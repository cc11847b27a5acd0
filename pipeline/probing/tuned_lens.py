"""The tuned lens: what a block's stream already says, after a small translation learned for it.

    hidden after block i -> hidden + hidden W_i^T + b_i -> final norm, output weight -> predictions

Of each block but the last W_i and b_i are trained so that these predictions come near the model's
own; the model stays as it is (Belrose et al. 2023, arXiv:2303.08112). Translators lie where the
head does, the same on each of its ranks, so the layout does not matter.

B micro-batch, S sequence, H hidden, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint.safetensors_file import write_safetensors
from pipeline.engine.counting import loss_masks
from pipeline.errors import MachineError
from pipeline.probing.passage import look
from pipeline.probing.readout import Readout
from pipeline.probing.request import translator_shapes

if TYPE_CHECKING:
    from pipeline.data.batch import Batch
    from pipeline.engine.forward_only import ForwardOnly

# The paper's: plain gradients and not Adam's, whose first steps have the size of rounding errors.
LR, MOMENTUM, DECAY, CLIP = 1.0, 0.9, 1e-3, 1.0


class TunedLens:
    """Translators of a model. Methods are collective but for `translate`: call on every rank."""

    def __init__(self, model: ForwardOnly) -> None:
        """Translators that change nothing."""
        self.model, self.readout = model, Readout(model)
        size, blocks = model.model.hidden_size, model.model.num_layers - 1
        device = model.layout.device
        here = blocks if self.readout.is_here else 0
        self.weights = [torch.zeros(size, size, device=device) for _ in range(here)]
        self.biases = [torch.zeros(size, device=device) for _ in range(here)]

    def translate(self, hidden: Tensor, block: int) -> Tensor:
        """(B, S, H) hidden as the head should read it, with the head; the last block's own."""
        if block == len(self.weights):
            return hidden
        moved = hidden.float() @ self.weights[block].t() + self.biases[block]
        return (hidden.float() + moved).to(hidden.dtype)

    def train(
        self, steps: Iterator[Sequence[Batch]], num_steps: int, *, alive: Callable[[], None]
    ) -> list[float]:
        """Train the translators; the mean divergence, nats a token, before the first step of each.

        Args:
            steps: this data-parallel rank's micro-batches of each step.
            num_steps: how many steps; the learning rate falls linearly to 0.
            alive: called between steps.
        """
        parameters = [*self.weights, *self.biases]
        velocity = [torch.zeros_like(value) for value in parameters]
        history = []
        for step, batches in zip(range(num_steps), steps, strict=False):
            sums, gradients = self._gradients(batches)
            lr = LR * (1 - step / num_steps)
            for value, gradient, moving in zip(parameters, gradients, velocity, strict=True):
                gradient.add_(value, alpha=DECAY)
                moving.mul_(MOMENTUM).add_(gradient)
                value.sub_(gradient.add(moving, alpha=MOMENTUM), alpha=lr)  # Nesterov's
            history.append(float(sums.mean()))
            alive()
        return history

    def _gradients(self, batches: Sequence[Batch]) -> tuple[Tensor, list[Tensor]]:
        """((L - 1,) mean divergence of each block, gradients of weights, then of biases), clipped.

        The norm of each translator's gradient is at most CLIP, so none depends on the others.
        """
        layout = self.model.layout
        masks, count = loss_masks(batches, layout)
        parameters = [*self.weights, *self.biases]
        totals = [torch.zeros_like(value) for value in parameters]
        sums = torch.zeros(self.model.model.num_layers - 1, device=layout.device)
        for batch, mask in zip(batches, masks, strict=True):
            passage = look(self.model, batch)
            shape = (mask.shape[0], mask.shape[1])
            streams = [
                self.readout.bring(passage, number, shape)
                for number in range(self.model.model.num_layers)
            ]
            here = [stream for stream in streams if stream is not None]
            if here:
                sums += self._add_gradients(here, mask / count, totals)
        if layout.data.size > 1:
            for value in (sums, *totals):
                dist.all_reduce(value, group=layout.data.group)
        if layout.pipeline.size > 1:  # they are known where the head is, and told on the main rank
            dist.all_reduce(sums, group=layout.pipeline.group)
        blocks = len(self.weights)
        for weight, bias in zip(totals[:blocks], totals[blocks:], strict=True):
            norm = (weight.square().sum() + bias.square().sum()).sqrt()
            factor = (CLIP / norm.clamp(min=CLIP)).float()
            weight.mul_(factor), bias.mul_(factor)
        return sums, totals

    def _add_gradients(
        self, streams: Sequence[Tensor], weights: Tensor, totals: Sequence[Tensor]
    ) -> Tensor:
        """(L - 1,) weighted sums of the divergences of a micro-batch; gradients go into totals."""
        *early, last = streams
        # From the head's side to the translation: the norm between them is torch's to derive.
        said, moved = [], []
        with torch.enable_grad():
            for block, stream in enumerate(early):
                moved.append(self.translate(stream, block).float().requires_grad_())
                said.append(self.readout.normed(moved[-1].to(stream.dtype)))
        sums, gradients = self.readout.divergences(said, self.readout.normed(last), weights)
        for block, stream in enumerate(early):
            said[block].backward(gradients[block].to(said[block].dtype))
            slope = moved[block].grad
            assert slope is not None
            flat = slope.flatten(0, 1)
            totals[block].add_(flat.t() @ stream.float().flatten(0, 1))
            totals[len(early) + block].add_(flat.sum(0))
        return sums

    # ---- on disk ---------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write layers.<i>.weight (H, H) and layers.<i>.bias (H,), fp32, from the main rank.

        Raises:
            MachineError: the file cannot be written.
        """
        layout, shapes = self.model.layout, translator_shapes(self.model.model)
        values = self._on_main(shapes)
        if not layout.ranks.is_main:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(path, shapes, values, torch.float32)
        except OSError as error:
            raise MachineError(f"{path} cannot be written: {error.strerror or error}.") from error

    def _on_main(self, shapes: dict[str, tuple[int, ...]]) -> list[Tensor]:
        """The tensors by name on the main rank, from the stage with the head; [] on other ranks."""
        layout = self.model.layout
        own = [t for pair in zip(self.weights, self.biases, strict=True) for t in pair]
        axis, last = layout.pipeline, layout.pipeline.size - 1
        if last == 0 or layout.tensor.rank or layout.data.rank:
            return own if layout.ranks.is_main else []
        if axis.rank == last:
            for value in own:
                dist.send(value, group=axis.group, group_dst=0)
        if axis.rank:
            return []
        values = [torch.empty(shape, device=layout.device) for shape in shapes.values()]
        for value in values:
            dist.recv(value, group=axis.group, group_src=last)
        return values

    def load(self, path: Path) -> None:
        """Take the translators of a file that `check_translators` has seen."""
        from safetensors.torch import load_file

        found = load_file(path)
        for block in range(len(self.weights)):
            self.weights[block].copy_(found[f"layers.{block}.weight"])
            self.biases[block].copy_(found[f"layers.{block}.bias"])
