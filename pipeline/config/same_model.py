"""Whether weights compute in one model what they compute in another: settings that must agree.

ModelConfig of the weights, ModelConfig of the run --differing--> names of settings
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.choices import Init, Position, RopeScaling
from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import resolve

# Settings that say how to train, not what is computed; sizes of tables, which others compare; and
# `moe` and `vision`, which are looked at by their parts.
FREE = {
    "name", "init", "init_std", "mup_base_hidden_size", "hidden_dropout", "attention_dropout",
    "compile", "z_loss_coeff", "vocab_size", "max_seq_len", "moe", "vision",
}  # fmt: skip
ROTARY = {"rope_theta", "rope_scaling", "rope_scaling_factor", "rope_original_max_seq_len"}
"""Those that stretch positions, as a run does on purpose that goes on with longer sequences."""


def differing(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    """Settings, such as `hidden_size` or `moe.top_k`, by which two models compute otherwise."""
    there, here = _comparable(theirs), _comparable(ours)
    return [key for key in there if here.get(key) != there[key]]


def another_model(weights: Path, theirs: ModelConfig, differ: Sequence[str]) -> str:
    """What to say of weights that differ: the settings to type."""
    wanted = " ".join(f"model.{key}={spelt(operator.attrgetter(key)(theirs))}" for key in differ)
    return f"{weights} holds another model. To train on with its weights, set {wanted}"


def spelt(value: Any) -> str:
    """A value as the command line writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else getattr(value, "name", str(value))


def _comparable(model: ModelConfig) -> dict[str, Any]:
    """Settings that must agree, with their defaults worked out."""
    values = {key: value for key, value in dataclasses.asdict(model).items() if key not in FREE}
    sizes = vars(resolve(model))
    values |= {key: size for key, size in sizes.items() if key in values}
    experts = ["num_experts"]
    experts += ["top_k", "shared_expert_ffn_hidden_size"] if model.moe.num_experts else []
    values |= {f"moe.{key}": getattr(model.moe, key) for key in experts}
    values["vision.num_layers"] = model.vision.num_layers
    if (encoder := resolve(model).vision) is not None:
        values |= {f"vision.{key}": size for key, size in vars(model.vision).items()}
        values["vision.ffn_hidden_size"] = encoder.ffn_hidden_size
    if model.rope_scaling is RopeScaling.none:
        del values["rope_scaling_factor"]
    if model.rope_scaling is not RopeScaling.llama3:
        del values["rope_original_max_seq_len"]
    if model.position is not Position.rope:
        del values["rope_theta"]
    # Other initial values are overwritten; muP also scales attention and logits.
    values["init"] = model.init if model.init is Init.mup else None
    if model.init is Init.mup:
        values["mup_base_hidden_size"] = model.mup_base_hidden_size
    return values
