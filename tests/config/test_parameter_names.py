"""The names and shapes of a model's parameters, known before it is built."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.config import parameter_names as names
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig
from pipeline.config.run_shape import derive
from pipeline.errors import ConfigError
from tests.support.layouts import MODELS, VOCAB, config
from tests.support.ranks import run_on_ranks
from tests.support.reference import parameter_shapes

# The reference reads text.
TEXT = [name for name, settings in MODELS.items() if "vision" not in settings]


@pytest.mark.parametrize("model", [*TEXT, "qwen2"])
def test_names_are_those_of_the_reference(model: str) -> None:
    cfg = config() if model not in MODELS else config(model)
    if model == "qwen2":
        cfg = replace(cfg, model=replace(cfg.model, bias=False, qkv_bias=True))
    cfg = replace(cfg, finetune=replace(cfg.finetune, lora_rank=3))
    found = names.parameter_shapes(cfg.model, cfg.finetune, vocab_size=VOCAB)
    assert found == parameter_shapes(cfg, VOCAB)


def test_a_built_model_has_exactly_these_names() -> None:
    for model, found in run_on_ranks(built_names, 1, ["gpt2-untied", "moe", "mqa", "pictures"])[
        0
    ].items():
        assert sorted(
            names.parameter_names(ModelConfig(**MODELS[model]), FinetuneConfig())
        ) == sorted(found)


def built_names(models: list[str]) -> dict[str, list[str]]:
    from pipeline.config.choices import Precision
    from pipeline.config.parallel_sizes import ParallelSizes
    from pipeline.config.training import ParallelConfig
    from pipeline.distributed.layout import connect
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.model.architecture import Architecture
    from pipeline.model.gpt import GPT
    from pipeline.model.names import canonical_name

    group = connect(ranks_from_environment(), ParallelSizes()).tensor.group
    found = {}
    for name in models:
        model = ModelConfig(**MODELS[name])
        architecture = Architecture(model, ParallelConfig(), Precision.fp32, VOCAB, 256)
        built = GPT(architecture, group).named_parameters()
        found[name] = [canonical_name(n, num_layers=model.num_layers) for n, _ in built]
    return found


PATTERNS: list[tuple[str, str]] = [
    ("embeding.*", r"embeding\.\* names no parameter .* Did you mean embedding"),
    ("layers.*.mlp.linear_fc3.weight", r"Did you mean layers\.\*\.mlp\.linear_fc[12]\.weight"),
    ("head.weight", "names no parameter"),  # of a model whose head is the word embedding
    ("x", r"They are .*layers\.\*\.self_attention\.linear_qkv\.\*"),
]


@pytest.mark.parametrize("pattern, message", PATTERNS)
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}], ids=["1", "tp2", "pp2"])
def test_a_misspelt_pattern_is_refused_at_every_layout(
    pattern: str, message: str, layout: dict[str, Any]
) -> None:
    """One process refused it, two went on without the scale."""
    cfg = config("gpt2", **layout)
    cfg = replace(cfg, optimizer=replace(cfg.optimizer, lr_scale={pattern: 0.5}))
    with pytest.raises(ConfigError, match=message):
        derive(cfg, world_size=len(layout) + 1, tokenizer_vocab_size=VOCAB)


def test_patterns_that_name_parameters_pass() -> None:
    cfg = config("gpt2")
    scale = {"embedding.*": 0.5, "layers.0.*": 2.0, "*.bias": 1.0}
    cfg = replace(cfg, optimizer=replace(cfg.optimizer, lr_scale=scale))
    derive(cfg, world_size=1, tokenizer_vocab_size=VOCAB)
    wrong = replace(cfg, optimizer=replace(cfg.optimizer, lr_scale={"*": float("nan")}))
    with pytest.raises(ConfigError, match=r"factor of \* \(nan\) must be at least 0"):
        derive(wrong, world_size=1, tokenizer_vocab_size=VOCAB)
