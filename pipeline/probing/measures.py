"""Everything that is measured of a model, alike at any layout.

    averages(batches)  lens losses, norms, attention entropy, sink, attribution: means over tokens
    kinds()            head scores on repeated random tokens
    view(batch)        of one text: attention maps, lens table

Every rank fills in what it computes and leaves zeros elsewhere; the sum over all ranks is the
whole.

L blocks, N heads of the model, B micro-batch, S sequence, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.choices import NormPlacement
from pipeline.data.batch import Batch
from pipeline.engine.counting import loss_masks
from pipeline.probing.heads import (
    KINDS,
    LOOKS,
    kinds,
    looks,
    of_all_heads,
    pattern,
    repeated_tokens,
)
from pipeline.probing.passage import Passage, blocks_of, heads_here, look
from pipeline.probing.readout import Readout

if TYPE_CHECKING:
    from pipeline.distributed.layout import ParallelLayout
    from pipeline.engine.forward_only import ForwardOnly
    from pipeline.probing.tuned_lens import TunedLens

Sums = dict[str, Tensor]
TOP = 5
"""Tokens of the lens table at each place."""


class Measures:
    """A model that is looked into. Methods are collective: call on every rank."""

    def __init__(self, model: ForwardOnly, tuned: TunedLens | None = None) -> None:
        """Look into a model; `tuned`: also through this lens."""
        self.model, self.layout, self.readout = model, model.layout, Readout(model)
        self.tuned = tuned
        self.num_layers = model.model.num_layers
        self.num_heads = model.model.num_attention_heads

    def averages(self, batches: Sequence[Batch], *, alive: Callable[[], None]) -> dict[str, Any]:
        """Means over the tokens whose labels count, over all data-parallel ranks.

        Returns:
            tokens: how many; lens_loss: [L] nats; tuned_loss: the same through the tuned lens, if
            there is one; residual, attention, mlp: [L] mean L2 norms of
            the stream after a block and of what its halves add; entropy, sink: [L][N] (heads.py);
            attribution: what parts add to the label's logit above the mean logit: heads [L][N],
            attention_bias, mlp [L], embedding, final_norm_bias; logit: their sum, read directly;
            both are missing of models with norm_placement=post.
        """
        totals: Sums = {}
        masks, _ = loss_masks(batches, self.layout)
        for batch, mask in zip(batches, masks, strict=True):
            passage = look(self.model, batch)
            for name, value in self._sums(passage, batch, mask).items():
                totals[name] = totals[name] + value if name in totals else value
            alive()
        totals = over_ranks(totals, self.layout)
        tokens, later = totals.pop("tokens"), totals.pop("later")
        means = {n: (v / (later if n == "sink" else tokens)).tolist() for n, v in totals.items()}
        adds = {n.partition(".")[2]: means.pop(n) for n in list(means) if n.startswith("adds.")}
        return {
            "tokens": round(float(tokens)), **means, **({"attribution": adds} if adds else {}),
        }  # fmt: skip

    def kinds(self, *, seq_len: int) -> dict[str, Any]:
        """previous, duplicate, induction: [L][N] (heads.py), on repeated random tokens.

        seq_len: longest sequence.
        """
        vocab_size, parts = self.readout.projection.vocab_size, self.model.schema.sequence_ranks
        ids, half = repeated_tokens(vocab_size, seq_len=seq_len, parts=parts)
        passage = look(self.model, self.batch_of(ids))
        found = self._of_heads(passage, partial(kinds, half=half), KINDS)
        copies = self.layout.data.size  # every data-parallel rank reads the same
        return {n: (v / copies).tolist() for n, v in over_ranks(found, self.layout).items()}

    def view(self, batch: Batch, *, count: int) -> dict[str, Any]:
        """Of a text: attention [L][N][S][S]; lens, and tuned if there is such a lens.

        Of a lens: ids, probabilities [L][S][TOP], losses [L][S].

        Args:
            batch: (1, S or more) tokens; what data-parallel rank 0 has is shown.
            count: S, the first tokens.
        """
        passage = look(self.model, batch)
        maps = torch.zeros(self.num_layers, self.num_heads, count, count, device=self.layout.device)
        for number, block in passage.items():
            for place, head in enumerate(heads_here(self.model)):
                maps[number, head] = pattern(block, place)[0, :count, :count]
        found: dict[str, Any] = {"attention": self._of_first_copy({"": maps})[""].tolist()}
        found["lens"] = self._lens(passage, batch, count=count)
        if self.tuned is not None:
            translate = self.tuned.translate
            found["tuned"] = self._lens(passage, batch, count=count, translate=translate)
        return found

    def _lens(
        self,
        passage: Passage,
        batch: Batch,
        *,
        count: int,
        translate: Callable[[Tensor, int], Tensor] = lambda hidden, _: hidden,
    ) -> dict[str, Any]:
        """What each block's stream predicts, after `translate`, at the first `count` tokens."""
        size = batch.tokens.shape[1]
        top = min(TOP, self.readout.projection.vocab_size)
        ids = torch.zeros(
            self.num_layers, size, top, dtype=torch.float64, device=self.layout.device
        )
        chances, losses = torch.zeros_like(ids), torch.zeros_like(ids[..., 0])
        for number in range(self.num_layers):
            hidden = self.readout.bring(passage, number, (1, size))
            if hidden is None:
                continue
            hidden = translate(hidden, number)
            found, log_chances = self.readout.likeliest(hidden, top)
            of_labels = self.readout.losses(hidden, batch.labels)
            if self.layout.tensor.rank == 0:
                ids[number], chances[number] = found[0].double(), log_chances[0].exp().double()
                losses[number] = of_labels[0].double()
        whole = self._of_first_copy({"ids": ids, "probabilities": chances, "losses": losses})
        shown = {name: value[:, :count] for name, value in whole.items()}
        return {name: (v.long() if name == "ids" else v).tolist() for name, v in shown.items()}

    def _of_first_copy(self, values: Sums) -> Sums:
        """Sums over all ranks of what the first copy of the model has."""
        if self.layout.data.rank > 0:
            values = {name: torch.zeros_like(value) for name, value in values.items()}
        return over_ranks(values, self.layout)

    def batch_of(self, ids: Tensor, *, count: int | None = None) -> Batch:
        """A micro-batch of whole sequences (B, S), each of one document, the same on every rank.

        Its labels count on the first data-parallel rank only.

        Args:
            ids: (B, S).
            count: real tokens, the others fill up; the label of the last real one does not count.
        """
        ids = ids.to(self.layout.device)
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        last = (ids.shape[1] if count is None else count) - 1
        schema = self.model.schema
        return Batch.of_whole_sequences(
            ids,
            loss_mask=(places < last).float() * (self.layout.data.rank == 0),
            documents=schema.documents,
            positions=schema.positions,
        )

    # ---- sums over this rank's tokens ------------------------------------------------------------

    def _sums(self, passage: Passage, batch: Batch, mask: Tensor) -> Sums:
        """fp64 sums over a micro-batch; zeros where another rank computes."""
        found = self._of_heads(passage, partial(looks, weights=mask), LOOKS)
        found |= self._of_blocks(passage, mask)
        final = None
        found["lens_loss"] = self._by_block()
        if self.tuned is not None:
            found["tuned_loss"] = self._by_block()
        for number in range(self.num_layers):
            final = self.readout.bring(passage, number, (mask.shape[0], mask.shape[1]))
            if final is not None:
                losses = self.readout.losses(final, batch.labels)  # with its tensor-parallel peers
                found["lens_loss"][number] = (losses * mask).double().sum() * self._counts
            if final is not None and self.tuned is not None:
                losses = self.readout.losses(self.tuned.translate(final, number), batch.labels)
                found["tuned_loss"][number] = (losses * mask).double().sum() * self._counts
        is_head = self._counts and final is not None
        found["tokens"] = mask.double().sum() * is_head
        found["later"] = mask[:, 1:].double().sum() * is_head
        if self.model.model.norm_placement is NormPlacement.post:
            return found  # a norm stands behind every sum: no part has a share of the logit
        directions, fixed = self.readout.directions(final, batch.labels)
        found |= self._attribution(passage, directions * mask[..., None])
        found["adds.final_norm_bias"] = (fixed * mask).double().sum() * is_head
        found["logit"] = found["adds.final_norm_bias"].clone()
        if is_head:
            assert final is not None
            found["logit"] += (final.float() * directions * mask[..., None]).double().sum()
        return found

    def _of_blocks(self, passage: Passage, mask: Tensor) -> Sums:
        """L2 norms of the stream and of what is added to it."""
        parts = {"residual": "after", "attention": "attended", "mlp": "mlp"}
        found = {name: self._by_block() for name in parts}
        if self._counts:
            for number, block in passage.items():
                for name, field in parts.items():
                    norms = getattr(block, field).float().norm(dim=-1)
                    found[name][number] = (norms * mask).double().sum()
        return found

    def _attribution(self, passage: Passage, directions: Tensor) -> Sums:
        """Dot products of what was added with (B, S, H) directions, 0 where no label counts.

        A head adds W_h c_h, its columns of the output projection times its part of the context:
        (W_h c_h) . d = c_h . (W_h^T d), so the heads' own vectors of width H never exist.
        """
        heads = heads_here(self.model)
        of_heads = self._by_block(self.num_heads)
        of_bias, of_mlp = self._by_block(), self._by_block()
        embedding = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        for number, block in passage.items():
            projection = blocks_of(self.model)[number].self_attention.linear_proj
            pulled = directions @ projection.weight.float()
            by_head = (pulled * block.context.float()).unflatten(-1, (len(heads), -1))
            of_heads[number, heads.start : heads.stop] = by_head.double().sum((0, 1, 3))
            if not self._counts:
                continue
            if projection.bias is not None:
                of_bias[number] = (directions @ projection.bias.float()).double().sum()
            of_mlp[number] = (directions * block.mlp.float()).double().sum()
            if number == 0:
                embedding = (directions * block.before.float()).double().sum()
        return {
            "adds.heads": of_heads,
            "adds.attention_bias": of_bias,
            "adds.mlp": of_mlp,
            "adds.embedding": embedding,
        }

    def _of_heads(
        self, passage: Passage, ask: Callable[[Tensor], Sums], names: Sequence[str]
    ) -> Sums:
        """[L][N] of each name; also of a rank whose stage has no block."""
        found = {name: self._by_block(self.num_heads) for name in names}
        of_all_heads(passage, ask, found, heads=heads_here(self.model))
        return found

    def _by_block(self, *more: int) -> Tensor:
        return torch.zeros(self.num_layers, *more, dtype=torch.float64, device=self.layout.device)

    @property
    def _counts(self) -> bool:
        """Of what every tensor-parallel rank has alike the first one's counts."""
        return self.layout.tensor.rank == 0


def over_ranks(values: Sums, layout: ParallelLayout) -> Sums:
    """The sums over all ranks, in the order of their names. Collective: call on every rank."""
    found = {}
    for name in sorted(values):
        found[name] = values[name].contiguous()
        for axis in (layout.tensor, layout.pipeline, layout.data):
            if axis.size > 1:
                dist.all_reduce(found[name], group=axis.group)
    return found
