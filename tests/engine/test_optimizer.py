"""Which parameters decay, and at what learning rate."""

import torch
from torch import nn

from pipeline.config.choices import Init, OptimizerName, Precision
from pipeline.config.model import ModelConfig
from pipeline.config.training import OptimizerConfig
from pipeline.engine.optimizer import build, parameter_groups, set_lr

SHAPES = {
    "embedding.word.weight": (8, 4),
    "layers.0.self_attention.linear_qkv.weight": (12, 4),
    "layers.0.self_attention.linear_qkv.bias": (12,),
    "final_norm.weight": (4,),
    "head.weight": (8, 4),
}


def groups(
    cfg: OptimizerConfig, model: ModelConfig | None = None
) -> dict[str, tuple[float, float]]:
    """Name -> (weight decay, factor of the learning rate)."""
    named = {name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    found = parameter_groups(named.items(), cfg, model or ModelConfig(hidden_size=4))
    return {
        name: (group["weight_decay"], group["lr_scale"])
        for group in found
        for name, parameter in named.items()
        if any(parameter is member for member in group["params"])
    }


def test_matrices_decay_and_vectors_do_not():
    decays = {
        name
        for name, (decay, _) in groups(
            OptimizerConfig(weight_decay=0.1, decay_embeddings=False)
        ).items()
        if decay
    }
    assert decays == {"layers.0.self_attention.linear_qkv.weight"}
    decays = {
        name
        for name, (decay, _) in groups(
            OptimizerConfig(weight_decay=0.1, decay_embeddings=True)
        ).items()
        if decay
    }
    assert decays == {name for name, shape in SHAPES.items() if len(shape) == 2}


def test_mup_slows_hidden_matrices_by_their_width():
    """Yang et al. 2022, arXiv:2203.03466, table 8: 1 / width for Adam, hidden matrices only."""
    model = ModelConfig(hidden_size=512, init=Init.mup, mup_base_hidden_size=128)
    scales = {name: scale for name, (_, scale) in groups(OptimizerConfig(), model).items()}
    assert scales.pop("layers.0.self_attention.linear_qkv.weight") == 0.25
    assert set(scales.values()) == {1.0}


def test_muon_has_the_linears_of_the_blocks_and_mup_slows_them_by_the_root():
    """An update whose singular values are equal is larger by the root of the width (arXiv:2310.17813)."""
    model = ModelConfig(hidden_size=512, init=Init.mup, mup_base_hidden_size=128)
    named = {name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    named["layers.0.mlp.router.weight"] = nn.Parameter(torch.ones(4, 4))
    cfg = OptimizerConfig(name=OptimizerName.muon)
    (muon,) = [g for g in parameter_groups(named.items(), cfg, model) if g["is_matrix"]]
    assert muon["params"] == [named["layers.0.self_attention.linear_qkv.weight"]]
    assert (muon["lr_scale"], muon["weight_decay"]) == (0.5, 0.1)
    adamw = parameter_groups(named.items(), OptimizerConfig(), model)
    assert not any(group["is_matrix"] for group in adamw)


def test_a_pattern_sets_the_learning_rate_of_what_it_names():
    scales = groups(OptimizerConfig(lr_scale={"embedding.*": 0.1}))
    assert [name for name, (_, scale) in scales.items() if scale == 0.1] == [
        "embedding.word.weight"
    ]
    last = groups(
        OptimizerConfig(lr_scale={"layers.-1.*": 0.1}), ModelConfig(hidden_size=4, num_layers=1)
    )
    slow = {name for name, (_, scale) in last.items() if scale == 0.1}
    top = max(int(name.split(".")[1]) for name in last if name.startswith("layers."))
    assert slow and slow == {name for name in last if name.startswith(f"layers.{top}.")}


def test_learning_rates_of_groups_move_together():
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = build(
        [
            {"params": [p], "weight_decay": 0.0, "lr_scale": s}
            for p, s in zip(parameters, (1.0, 0.5))
        ],
        OptimizerConfig(),
        Precision.fp32,
    )
    set_lr(optimizer, 0.02)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.01]
