"""Mixtures of experts: megatron-core's MoE layer with our linears and a loss by sequence.

    hidden -> router -> (top_k experts of each token, their weights) -> experts -> weighted sum

The router has two losses. Load balancing (Fedus et al. 2021, arXiv:2101.03961) is not additive: a
product of two means over some set of tokens. megatron-core's default takes the micro-batch as the
set, so that the loss of a step changes with micro_batch_size and with which rank reads which
sample; ours takes the sequence, as DeepSeek-V3 does (arXiv:2412.19437, eq. 17), and the mean over
sequences is the same at every layout. The z-loss is a mean over tokens.
"""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from pipeline.model.tensor_parallel import ColumnLinear, RowLinear


class Router(TopKRouter):
    """megatron-core's router for hidden states of either layout."""

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


def build_experts(config: TransformerConfig, *, layer: int) -> nn.Module:
    """megatron-core's MoE layer in place of block `layer`'s MLP; its output is (hidden, None)."""
    spec = get_mlp_module_spec(use_te=False, num_experts=config.num_moe_experts)
    spec.submodules.router = Router
    linears = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)
    spec.submodules.experts.submodules = spec.submodules.shared_experts.submodules = linears
    moe = build_module(spec, config=config)
    moe.set_layer_number(layer + 1)
    return moe


def set_moe_loss_scale(scale: Tensor) -> None:
    """0-dim weight of the router losses in the backward pass, which bypass the engine's scaling."""
    MoEAuxLossAutoScaler.set_loss_scale(scale)
