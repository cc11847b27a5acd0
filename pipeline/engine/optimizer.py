"""Parameter groups and the optimizer that DeepSpeed partitions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pipeline.config.choices import Init
from pipeline.config.model import ModelConfig
from pipeline.config.parameter_names import matches
from pipeline.config.training import OptimizerConfig


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], cfg: OptimizerConfig, model: ModelConfig
) -> list[dict[str, Any]]:
    """Groups with `params`, `weight_decay` and `lr_scale`, in an order that depends on names only.

    Matrices decay, norms and biases do not (Brown et al. 2020, appendix B, decays all; excluding
    vectors is GPT-2's later practice). lr_scale comes from cfg.lr_scale patterns and, under muP, 1
    / width for hidden matrices. A stage of a pipeline need not hold every name: that each pattern
    names a parameter was checked before (config/model_rules.py).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        matching = [pattern for pattern in cfg.lr_scale if matches(name, [pattern], model)]
        scale = cfg.lr_scale[matching[0]] if matching else 1.0
        is_matrix = parameter.dim() > 1
        if model.init is Init.mup and is_matrix and name.startswith("layers."):
            scale *= model.mup_base_hidden_size / model.hidden_size
        is_embedding = name.startswith(("embedding.", "head."))
        decays = is_matrix and (cfg.decay_embeddings or not is_embedding)
        groups.setdefault((cfg.weight_decay if decays else 0.0, scale), []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), members in sorted(groups.items(), key=lambda g: g[0])
    ]


def build(groups: list[dict[str, Any]], cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """Torch's fused AdamW, on CPU and CUDA (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    return torch.optim.AdamW(
        groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True
    )


def set_lr(optimizer: Any, lr: float) -> None:
    """Set every group's learning rate to lr * lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
