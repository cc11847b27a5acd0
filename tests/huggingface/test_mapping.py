"""Which class computes a model, and which none does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.config.model import ModelConfig
from pipeline.errors import ConfigError
from pipeline.huggingface.mapping import mapping_for
from tests.support.layouts import MODELS, VOCAB


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt1", "norm_placement=post"),
        ("parallel", "parallel_residual"),
        ("capped", "logit_softcap=5.0"),
        ("mqa", "position=none"),
    ],
)
def test_model_that_no_class_computes_is_refused_with_the_reason(name: str, reason: str) -> None:
    """Gibberish after conversion is what makes people distrust exports."""
    with pytest.raises(ConfigError, match=reason):
        mapping_for(replace(ModelConfig(**MODELS[name]), vocab_size=VOCAB))
