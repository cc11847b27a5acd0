"""Parameter groups and the optimizer that DeepSpeed partitions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pipeline.config.choices import Init, OptimizerName, Precision
from pipeline.config.model import ModelConfig
from pipeline.config.parameter_names import is_linear_weight, matches
from pipeline.config.training import OptimizerConfig
from pipeline.engine.muon import Muon
from pipeline.model.partition import EXPERTS, spans_data


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], cfg: OptimizerConfig, model: ModelConfig
) -> list[dict[str, Any]]:
    """Groups with `params`, `weight_decay`, `lr_scale` and `is_matrix` (whether Muon updates them).

    Their order depends on names only.

    Matrices decay, norms and biases do not (Brown et al. 2020, appendix B, decays all; excluding
    vectors is GPT-2's later practice). lr_scale comes from cfg.lr_scale patterns and, under muP, 1
    / width for hidden matrices, 1 / sqrt(width) under Muon: the largest singular value of an update
    with elements of one size grows with the width where its rank is low (Adam), with its root where
    all singular values are equal (Muon), and must not grow (Yang et al. 2023, arXiv:2310.17813). A
    stage of a pipeline need not hold every name: that each pattern names a parameter was checked
    before (config/name_rules.py).
    """
    groups: dict[tuple[float, float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        matching = [pattern for pattern in cfg.lr_scale if matches(name, [pattern], model)]
        scale = cfg.lr_scale[matching[0]] if matching else 1.0
        is_matrix = parameter.dim() > 1
        is_muon = cfg.name is OptimizerName.muon and is_linear_weight(name)
        if model.init is Init.mup and is_matrix and name.startswith("layers."):
            growth = model.hidden_size / model.mup_base_hidden_size
            scale /= math.sqrt(growth) if is_muon else growth
        is_embedding = name.startswith(("embedding.", "head."))
        decays = is_matrix and (cfg.decay_embeddings or not is_embedding)
        key = (cfg.weight_decay if decays else 0.0, scale, is_muon, spans_data(parameter))
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr_scale": scale, "is_matrix": is_muon}
        # DeepSpeed's words: reduced and partitioned over the copies of the same experts alone.
        | ({"moe": True, "name": EXPERTS} if experts else {})
        for (decay, scale, is_muon, experts), members in sorted(groups.items(), key=lambda g: g[0])
    ]


def build(
    groups: list[dict[str, Any]], cfg: OptimizerConfig, precision: Precision
) -> torch.optim.Optimizer:
    """Torch's fused AdamW, on CPU and CUDA (Loshchilov & Hutter 2019, arXiv:1711.05101), or Muon.

    Args:
        precision: of the run; Muon makes matrices orthogonal in bf16 where it is not fp32.
    """
    adamw: dict[str, Any] = {"lr": cfg.lr, "betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps}
    if cfg.name is OptimizerName.muon:
        dtype = torch.float32 if precision is Precision.fp32 else torch.bfloat16
        return Muon(groups, momentum=cfg.momentum, dtype=dtype, **adamw)
    return torch.optim.AdamW(groups, fused=True, **adamw)


def set_lr(optimizer: Any, lr: float) -> None:
    """Set every group's learning rate to lr * lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
