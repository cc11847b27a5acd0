"""The residual stream read through the model's own head: lens and direct logit attribution.

    hidden after any block -> final norm -> output weight -> loss, likeliest tokens  (logit lens)
    label's logit = sum over embedding, heads, MLPs, biases of (what it added) . direction

Logit lens: nostalgebraist 2020. Attribution: Elhage et al. 2021, with the final norm's scale as it
was. The head lies on the last stage: hidden travels there, directions come from there.

B micro-batch, S sequence, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.engine.forward_only import ForwardOnly
from pipeline.model.predictions import divergences, label_losses, likeliest_tokens
from pipeline.model.tensor_parallel import Norm
from pipeline.probing.passage import Passage


class Readout:
    """The head of a model that is only asked. Methods are collective: call on every rank."""

    def __init__(self, model: ForwardOnly) -> None:
        self.model, self.layout = model, model.layout
        self.projection = model.module.cross_entropy.projection

    @property
    def is_here(self) -> bool:
        """Whether this rank's stage ends with the head."""
        return self.model.module.head is not None

    def bring(self, passage: Passage, block: int, shape: tuple[int, int]) -> Tensor | None:
        """(B, S, H) hidden after a block, on the ranks that have the head; None elsewhere.

        Args:
            shape: B, S.
        """
        owner, last = self.model.stage_of(block), self.layout.pipeline.size - 1
        here, group = self.layout.pipeline.rank, self.layout.pipeline.group
        if owner == last:
            return passage[block].after if here == last else None
        if here == owner:
            dist.send(passage[block].after.contiguous(), group=group, group_dst=last)
        if here != last:
            return None
        hidden = torch.empty(
            *shape, self.model.model.hidden_size, dtype=self.model.dtype, device=self.layout.device
        )
        dist.recv(hidden, group=group, group_src=owner)
        return hidden

    def losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """(B, S) fp32 cross entropy of the labels, were hidden the last block's; with the head."""
        return label_losses(self.normed(hidden), self._weight, labels, self.projection)

    def likeliest(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """((B, S, count) ids, fp32 log-probabilities), likeliest first; with the head."""
        return likeliest_tokens(self.normed(hidden), self._weight, self.projection, count=count)

    def normed(self, hidden: Tensor) -> Tensor:
        """Hidden behind the final norm; with the head."""
        norm: Tensor = self._head.norm(hidden)
        return norm

    def divergences(
        self, said: Sequence[Tensor], target: Tensor, weights: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Of n normed hidden from the one of the model: model/loss.py's; with the head."""
        return divergences(said, target, self._weight, weights, self.projection)

    def directions(self, final: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What a vector in the residual stream adds to its token's label, by dot product.

        To the label's logit above the mean logit of the vocabulary, before any softcap.

        Args:
            final: (B, S, H) hidden after the last block, with the head; None elsewhere.
            labels: (B, S).

        Returns:
            ((B, S, H) fp32 directions, (B, S) fp32 what the final norm's bias adds).
        """
        size = self.model.model.hidden_size
        both = torch.empty(*labels.shape, size + 1, device=self.layout.device)
        if final is not None:
            both = self._directions(final.float(), labels)
        if self.layout.pipeline.size > 1:
            last = self.layout.pipeline.size - 1
            dist.broadcast(both, group=self.layout.pipeline.group, group_src=last)
        return both[..., :-1], both[..., -1]

    def _directions(self, final: Tensor, labels: Tensor) -> Tensor:
        """(B, S, H + 1): direction, and what the final norm's bias adds."""
        norm = self._head.norm
        assert isinstance(norm, Norm), "with norm_placement=post nobody asks"
        chosen = self._label_rows(labels) * self.projection.scale
        direction = chosen * norm.weight.float()
        if norm.bias is None:  # RMSNorm: x / rms(x) * w
            spread = final.square().mean(-1, keepdim=True)
            fixed = torch.zeros_like(chosen[..., :1])
        else:  # LayerNorm: (x - mean x) / std x * w + b, and (x - mean x) . d = x . (d - mean d)
            spread = final.var(-1, keepdim=True, unbiased=False)
            direction = direction - direction.mean(-1, keepdim=True)
            fixed = (chosen * norm.bias.float()).sum(-1, keepdim=True)
        return torch.cat([direction * torch.rsqrt(spread + norm.eps), fixed], dim=-1)

    def _label_rows(self, labels: Tensor) -> Tensor:
        """(B, S, H) fp32: the output weight's row of each label, less the mean of all rows."""
        rows = self._weight.float()
        first = self.projection.rank * rows.shape[0]
        real = max(0, min(rows.shape[0], self.projection.vocab_size - first))
        at = labels - first
        is_here = (at >= 0) & (at < rows.shape[0])
        chosen = rows[at.clamp(0, rows.shape[0] - 1)] * is_here[..., None]
        chosen = chosen - rows[:real].sum(0) / self.projection.vocab_size
        if self.projection.group is not None:
            dist.all_reduce(chosen, group=self.projection.group)
        return chosen

    @property
    def _head(self) -> Any:
        assert self.model.module.head is not None, "this stage has no head"
        return self.model.module.head

    @property
    def _weight(self) -> Tensor:
        return self.model.module.output_weight
