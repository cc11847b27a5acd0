"""A run of GPT-3 6.7B that is only planned: shared by the tests of memory and advice."""

from __future__ import annotations

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape, derive


def run_of(*settings: str, world_size: int = 8) -> tuple[PretrainConfig, RunShape]:
    """Its settings and derived numbers."""
    words = [
        "data.path=x",
        "model=gpt3-6.7b",
        "model.vocab_size=50304",
        "training.global_batch_size=64",
        *settings,
    ]
    cfg = cli.compose(PretrainConfig, ["training.total_steps=1000", *words], config="pretrain")
    return cfg, derive(cfg, world_size=world_size, tokenizer_vocab_size=50257)
