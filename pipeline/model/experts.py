"""Mixtures of experts: megatron-core's MoE layer with our linears and a loss by sequence.

    hidden -> router -> (top_k experts of each token, their weights) -> experts -> weighted sum

The router has two losses. Load balancing (Fedus et al. 2021, arXiv:2101.03961) is not additive: a
product of two means over some set of tokens. megatron-core's default takes the micro-batch as the
set, so that the loss of a step changes with micro_batch_size and with which rank reads which
sample; ours takes the sequence, as DeepSeek-V3 does (arXiv:2412.19437, eq. 17), and the mean over
sequences is the same at every layout. The z-loss is a mean over tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from pipeline.model.activations import activate
from pipeline.model.grouped import goes, grouped_product
from pipeline.model.partition import mark_expert
from pipeline.model.recompute import is_replay
from pipeline.model.tensor_parallel import ColumnLinear, RowLinear


class Router(TopKRouter):
    """megatron-core's router for hidden states of either layout; it counts what it does."""

    tally: Tensor | None = None
    """(experts + 2,) fp64 sums since they were taken: tokens sent to each expert, entropy of the
    tokens' distributions over experts in nats, tokens. None: nothing yet.
    """

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(weights, choice) of each token, (tokens, experts); logits: (..., experts) fp32."""
        weights, choice = super().routing(logits, padding_mask)
        if self.training and not is_replay():
            self._count(logits.detach().flatten(0, -2), choice)
        return weights, choice

    @torch.no_grad()
    def _count(self, logits: Tensor, choice: Tensor) -> None:
        """Add a micro-batch to the sums, on the device: the host reads them on logging steps."""
        surprise = -logits.log_softmax(-1)
        entropy = (surprise.neg().exp() * surprise).sum()
        rows = entropy.new_full((), len(choice))
        sums = torch.cat([choice.sum(0).double(), torch.stack([entropy, rows]).double()])
        self.tally = sums if self.tally is None else self.tally.add_(sums)

    def _apply_seq_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """`probs` with the load-balancing loss attached; scores and map: (tokens, experts).

        megatron-core takes the first dimension of hidden for the sequence. Without sequence
        parallelism it is the batch, and the statistics would be those of one position over the
        sequences of a micro-batch: finite, plausible, and different for every micro_batch_size.
        """
        if not self.config.sequence_parallel:
            seq_length, bsz = bsz, seq_length
            scores_for_aux_loss, routing_map = (
                x.view(bsz, seq_length, -1).transpose(0, 1)
                for x in (scores_for_aux_loss, routing_map)
            )
        return super()._apply_seq_aux_loss(
            probs, scores_for_aux_loss, routing_map, seq_length, bsz, with_padding_mask
        )


class Experts(SequentialMLP):
    """This rank's experts, by their numbers among all of the layer."""

    local_experts: nn.Module

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, *args: Any, **kwargs: Any
    ) -> None:
        """As SequentialMLP."""
        super().__init__(num_local_experts, config, *args, **kwargs)
        # Names say which experts these are: initial weights, checkpoints and exports go by name.
        first = self.ep_group.rank() * num_local_experts
        built = enumerate(self.local_experts.children(), start=first)
        self.local_experts = nn.ModuleDict({str(number): expert for number, expert in built})
        if (size := self.ep_group.size()) > 1:
            for parameter in self.parameters():
                mark_expert(parameter, spans_data=size > config.tensor_model_parallel_size)

    def forward(self, tokens: Tensor, counts: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """(outputs, None) of tokens sorted by expert.

        Args:
            tokens: (N, H).
            counts: of the tokens of each expert, on the host; they add up to N.
            weights: (N,), of the tokens in their sums.
        """
        experts: list[Any] = list(self.local_experts.children())
        inner, outer = [e.linear_fc1 for e in experts], [e.linear_fc2 for e in experts]
        if all(goes(tokens, [linear.weight for linear in alike]) for alike in (inner, outer)):
            ends = counts.cumsum(0).to(tokens.device, torch.int32, non_blocking=True)
            wide = grouped_product(tokens, ends, [linear.weight for linear in inner])
            weighted = self._activate(wide, weights)
            return grouped_product(weighted, ends, [linear.weight for linear in outer]), None
        sizes = counts.tolist()
        parts = zip(inner, outer, tokens.split(sizes), weights.split(sizes), strict=True)
        outputs = [fc2(self._activate(fc1(x)[0], w))[0] for fc1, fc2, x, w in parts]
        return torch.cat(outputs), None

    def _activate(self, wide: Tensor, weights: Tensor) -> Tensor:
        """Between an expert's two products; a token's weight goes in before the second one.

        megatron-core's own adds its glu_linear_offset, 0, to a gated expert's half: another copy of
        it until the backward pass, 8 GiB of 118 for eight experts of modern-1.3b.
        """
        config = self.config
        inner = activate(wide, config.activation_func, is_gated=config.gated_linear_unit)
        return (inner * weights.unsqueeze(-1)).to(inner.dtype)


class SharedExpert(SharedExpertMLP):
    """The expert of all tokens, with as few copies as the others."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Its output in the layout of `hidden`."""
        config = self.config
        wide = self.linear_fc1(hidden)[0]
        inner = activate(wide, config.activation_func, is_gated=config.gated_linear_unit)
        return self.linear_fc2(inner)[0]


class MixtureLayer(MoELayer):
    """megatron-core's layer as DeepSpeed looks for it (engine/deepspeed/experts.py)."""

    @property
    def num_experts(self) -> int:
        """Of the whole layer."""
        return self.config.num_moe_experts


def build_experts(config: TransformerConfig, *, layer: int) -> nn.Module:
    """megatron-core's MoE layer in place of block `layer`'s MLP; its output is (hidden, None)."""
    linears = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)
    # By their constructors: an assignment to a field that a release has renamed would leave
    # megatron-core's router in its place, and say nothing.
    parts = MoESubmodules(
        router=Router,
        experts=ModuleSpec(Experts, submodules=linears),
        shared_experts=ModuleSpec(SharedExpert, submodules=linears),
    )
    moe = build_module(ModuleSpec(MixtureLayer, submodules=parts), config=config)
    moe.set_layer_number(layer + 1)
    return moe


def take_tallies(module: nn.Module, *, num_layers: int, num_experts: int, device: Any) -> Tensor:
    """(num_layers, num_experts + 2) fp64: what this rank's routers counted since the last time.

    Rows of layers on other ranks are 0.
    """
    found = torch.zeros(num_layers, num_experts + 2, dtype=torch.float64, device=device)
    for part in module.modules():
        if isinstance(part, Router) and part.tally is not None:
            found[part.layer_number - 1] = part.tally
            part.tally = None
    return found


def set_moe_loss_scale(scale: Tensor, *, context_ranks: int) -> None:
    """Weigh the router losses in the backward pass, where they bypass the engine's scaling.

    megatron-core computes them of all ranks that share a sequence, so that those ranks' parts add
    up to the gradient; the engine takes the mean over these ranks, as over all copies of the model.
    Without the factor the loss of a run's first step is right and every gradient is not.

    Args:
        scale: 0-dim, of the micro-batch's own loss.
        context_ranks: that share a sequence.
    """
    MoEAuxLossAutoScaler.set_loss_scale(scale * context_ranks)
