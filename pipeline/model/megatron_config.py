"""megatron-core's view of a block, from our settings."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from pipeline.config.choices import Init, Normalization
from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import resolve
from pipeline.config.training import ParallelConfig
from pipeline.model.activations import ACTIVATIONS

PER_SEQUENCE = "seq_aux_loss"  # megatron-core's name for the load-balancing loss of experts.py


def transformer_config(model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """megatron-core's configuration of one block; model/initial_values.py fills the weights."""
    on_cpu, sizes = not torch.cuda.is_available(), resolve(model)
    tensor, expert = parallel.tensor_parallel_size, parallel.expert_parallel_size
    moe: dict[str, Any] = {}
    if model.moe.num_experts:
        # Experts that are split gather tokens in unequal parts, for which gloo waits for ever.
        gathers = on_cpu and tensor > 1 and expert == 1
        moe = {
            "num_moe_experts": model.moe.num_experts,
            "moe_router_topk": model.moe.top_k,
            # The softmax over one chosen expert is always 1: nothing would teach the router
            # (arXiv:2101.03961).
            "moe_router_pre_softmax": model.moe.top_k == 1,
            "moe_ffn_hidden_size": sizes.ffn_hidden_size,
            "moe_shared_expert_intermediate_size": model.moe.shared_expert_ffn_hidden_size or None,
            "moe_router_load_balancing_type": PER_SEQUENCE if model.moe.aux_loss_coeff else "none",
            "moe_aux_loss_coeff": model.moe.aux_loss_coeff,
            "moe_z_loss_coeff": model.moe.z_loss_coeff or None,
            "moe_token_dispatcher_type": "allgather" if gathers else "alltoall",
            "moe_router_dtype": "fp32",
        }
    with warnings.catch_warnings():
        # Advice about Transformer Engine and fusions that we do not use.
        warnings.simplefilter("ignore")
        return TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=sizes.num_query_groups,
            kv_channels=sizes.head_dim,
            ffn_hidden_size=sizes.ffn_hidden_size,
            activation_func=ACTIVATIONS[model.activation],
            gated_linear_unit=sizes.is_gated,
            add_bias_linear=model.bias,
            add_qkv_bias=sizes.qkv_bias,
            normalization="RMSNorm"
            if model.normalization is Normalization.rmsnorm
            else "LayerNorm",
            layernorm_epsilon=model.norm_eps,
            qk_layernorm=model.qk_norm,
            hidden_dropout=model.hidden_dropout,
            attention_dropout=model.attention_dropout,
            softmax_scale=1.0 / sizes.head_dim if model.init is Init.mup else None,
            tensor_model_parallel_size=tensor,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=1 if expert > 1 else tensor,
            sequence_parallel=parallel.sequence_parallel,
            use_cpu_initialization=on_cpu,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            apply_rope_fusion=False,
            **moe,
        )
