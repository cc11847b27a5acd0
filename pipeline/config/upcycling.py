"""A mixture of experts that begins as a dense model: every expert a copy of its MLP.

    dense weights, ModelConfig of the mixture --checkpoint.upcycle--> where each parameter begins

Of copies it does not matter which experts a token is sent to, and the weights of several add up to
1: the mixture's first losses are the dense model's (Komatsuzaki et al. 2022, arXiv:2212.05055). The
routers begin at random, and so tell the copies apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from pipeline.config.model import ModelConfig, MoeConfig
from pipeline.config.model_shape import resolve
from pipeline.config.parameter_names import freezes
from pipeline.config.pretrain import PretrainConfig


def dense_model(model: ModelConfig) -> ModelConfig:
    """The model whose MLP each expert of `model` is a copy of."""
    width = resolve(model).ffn_hidden_size
    return replace(model, moe=MoeConfig(), ffn_hidden_size=width)


def dense_name(name: str) -> str | None:
    """The dense model's name of what a parameter is a copy of; None: a router, which has none."""
    if ".mlp.router." in name:
        return None
    return re.sub(r"\.experts\.local_experts\.\d+\.", ".", name)


def upcycling(cfg: PretrainConfig) -> Iterator[str]:
    """Copies of an MLP compute what it did, and are trained."""
    if not cfg.checkpoint.upcycle:
        return
    moe = cfg.model.moe
    if not cfg.checkpoint.init_from:
        yield "checkpoint.upcycle=true copies a dense model: set checkpoint.init_from to it."
    if not moe.num_experts:
        yield "checkpoint.upcycle=true makes experts; model.moe.num_experts is 0. Set it."
    elif moe.top_k == 1:
        yield (
            "checkpoint.upcycle=true needs model.moe.top_k of at least 2: a single expert is "
            "weighted by its probability, and would add a part only of what the MLP did."
        )
    if moe.shared_expert_ffn_hidden_size:
        yield (
            "checkpoint.upcycle=true needs model.moe.shared_expert_ffn_hidden_size=0: a shared "
            "expert would add to what the MLP did."
        )
    if moe.num_experts and freezes(cfg.model, cfg.finetune):
        yield (
            f"checkpoint.upcycle=true trains every expert; finetune.train "
            f"({', '.join(cfg.finetune.train)}) leaves parameters frozen. Set finetune=full."
        )
