"""Every null of the architecture is filled in one place."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

from pipeline.config.choices import Activation
from pipeline.config.model import ModelConfig, MoeConfig
from pipeline.config.model_shape import ModelShape, resolve

PIPELINE = Path(__file__).resolve().parents[2] / "pipeline"
NULLABLE = {"num_query_groups", "head_dim", "ffn_hidden_size", "qkv_bias"}
MODEL = ModelConfig(name="m", num_layers=2, hidden_size=64, num_attention_heads=4)


def test_nulls_stand_for_what_their_documentation_says() -> None:
    assert resolve(MODEL) == ModelShape(4, 16, 256, qkv_bias=True, is_gated=False)
    assert not resolve(replace(MODEL, bias=False)).qkv_bias
    assert resolve(replace(MODEL, moe=MoeConfig(num_experts=2))).ffn_hidden_size == 256


def test_what_is_set_stays() -> None:
    model = replace(
        MODEL, num_query_groups=2, head_dim=24, ffn_hidden_size=96, qkv_bias=False,
        activation=Activation.swiglu, moe=MoeConfig(num_experts=0, ffn_hidden_size=8),
    )  # fmt: skip
    assert resolve(model) == ModelShape(2, 24, 96, qkv_bias=False, is_gated=True)
    moe = MoeConfig(num_experts=2, ffn_hidden_size=8)
    assert resolve(replace(model, moe=moe)).ffn_hidden_size == 8


def test_nothing_else_reads_a_nullable_size() -> None:
    """A null that is worked out in a second place is worked out differently one day."""
    readers = set()
    for path in sorted(PIPELINE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in NULLABLE:
                if ast.unparse(node.value).split(".")[-1] in ("model", "moe", "vision"):
                    readers.add(f"{path.relative_to(PIPELINE)}: {ast.unparse(node)}")
    allowed = {"config/model_rules.py: model.head_dim"}  # whether it is set decides the message
    assert {r for r in readers if not r.startswith("config/model_shape.py")} == allowed
