"""Weights are taken over into a model that computes the same."""

from dataclasses import replace
from typing import Any

import pytest

from pipeline.config.choices import Activation, Init, Normalization, Position, RopeScaling
from pipeline.config.model import ModelConfig, MoeConfig, VisionConfig
from pipeline.config.same_model import another_model, differing

MODEL = ModelConfig(
    name="a", num_layers=2, hidden_size=32, num_attention_heads=4, position=Position.rope, bias=False
)  # fmt: skip


@pytest.mark.parametrize(
    "change, keys",
    [
        ({"activation": Activation.gelu}, ["activation"]),
        ({"normalization": Normalization.rmsnorm, "norm_eps": 1e-6}, ["normalization", "norm_eps"]),
        ({"rope_theta": 5e5}, ["rope_theta"]),
        ({"rope_scaling": RopeScaling.linear, "rope_scaling_factor": 2.0},
         ["rope_scaling", "rope_scaling_factor"]),
        ({"bias": True}, ["bias", "qkv_bias"]),
        ({"tied_embeddings": False}, ["tied_embeddings"]),
        ({"logit_softcap": 30.0}, ["logit_softcap"]),
        ({"init": Init.mup}, ["init", "mup_base_hidden_size"]),
        ({"moe": MoeConfig(num_experts=4, top_k=1)},
         ["moe.num_experts", "moe.top_k", "moe.shared_expert_ffn_hidden_size"]),
        ({"vision": VisionConfig(num_layers=2)},
         ["vision.num_layers", "vision.hidden_size", "vision.num_attention_heads",
          "vision.ffn_hidden_size", "vision.image_size", "vision.patch_size"]),
    ],
)  # fmt: skip
def test_what_changes_the_result_is_named(change: dict[str, Any], keys: list[str]) -> None:
    """A difference that no tensor shows would train another model without a word."""
    assert sorted(differing(replace(MODEL, **change), MODEL)) == sorted(keys)
    assert differing(MODEL, replace(MODEL, **change))[0] in keys


@pytest.mark.parametrize(
    "change",
    [
        {"name": "b", "hidden_dropout": 0.1, "init": Init.fixed, "init_std": 0.1, "compile": True},
        {"num_query_groups": 4, "head_dim": 8, "ffn_hidden_size": 128, "qkv_bias": False},
        {"max_seq_len": 4096, "vocab_size": 64, "rope_original_max_seq_len": 64},
        {"moe": MoeConfig(aux_loss_coeff=0.5)},
        {"vision": VisionConfig(hidden_size=64, image_size=32)},
    ],
)
def test_what_does_not_is_free(change: dict[str, Any]) -> None:
    """How to train, defaults that are written out, and tables, which are compared by their rows."""
    assert differing(replace(MODEL, **change), MODEL) == []


def test_the_message_is_what_to_type() -> None:
    theirs = replace(MODEL, bias=True, moe=MoeConfig(num_experts=2))
    differ = differing(theirs, MODEL)
    assert "model.bias=true model.qkv_bias=null" in another_model("F", theirs, differ)
    assert "model.moe.num_experts=2" in another_model("F", theirs, differ)
