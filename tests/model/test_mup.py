"""Coordinate check of muP (Yang et al. 2022, arXiv:2203.03466, appendix D): activations keep their size as width grows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from pipeline.config.choices import Init
from tests.support.layouts import VOCAB, batches, config, rank_batches, reset_parallel_state
from tests.support.ranks import run_on_ranks

WIDTHS = (64, 256)


def record(sizes: dict[str, float], key: str) -> Callable[..., None]:
    """A forward hook that notes the mean size of the module's output."""

    def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        sizes[key] = float(output.detach().abs().mean())

    return hook


def activation_sizes(init: str, optimizer: str) -> list[dict[str, float]]:
    """For each width, the mean size of every block's attention and MLP output after five steps at one learning rate."""
    from pipeline.config.run_shape import derive
    from pipeline.distributed.layout import connect
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.training.build import build_engine

    sizes: list[dict[str, float]] = []
    for width in WIDTHS:
        cfg = config("gpt2-untied", micro_batch_size=16, optimizer=optimizer)
        model = replace(
            cfg.model,
            hidden_size=width,
            num_attention_heads=width // 16,
            num_layers=2,
            init=Init[init],
            mup_base_hidden_size=WIDTHS[0],
        )
        cfg = replace(
            cfg,
            model=model,
            optimizer=replace(cfg.optimizer, lr=1e-2),
            schedule=replace(cfg.schedule, warmup_steps=0),
        )
        shape = derive(cfg, world_size=1, tokenizer_vocab_size=VOCAB)
        layout = connect(ranks_from_environment(), shape.sizes)
        engine, seen = build_engine(cfg, shape, layout), {}
        for i, block in enumerate(engine.runner.module.layers):
            for name in ("self_attention", "mlp"):
                getattr(block, name).register_forward_hook(record(seen, f"{name} {i}"))
        for number, step in enumerate(batches()[:6]):
            engine.train_step(rank_batches(step, shape, layout), step=number)
        sizes.append(seen)
        reset_parallel_state()
    return sizes


def growth(init: str, optimizer: str) -> list[float]:
    narrow, wide = run_on_ranks(activation_sizes, 1, init, optimizer)[0]
    return [wide[key] / narrow[key] for key in narrow]


@pytest.mark.slow
def test_activations_keep_their_size_with_width_under_mup_and_explode_without() -> None:
    assert all(0.25 < ratio < 2 for ratio in growth("mup", "adamw"))
    assert all(ratio > 4 for ratio in growth("scaled", "adamw"))


def test_activations_keep_their_size_with_width_under_mup_and_muon() -> None:
    """Its updates grow with the root of the width, so that muP divides by the root."""
    found = growth("mup", "muon")
    assert all(0.25 < ratio < 2 for ratio in found), found
