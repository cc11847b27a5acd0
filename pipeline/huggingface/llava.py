"""LlavaForConditionalGeneration: a SigLIP tower, a projector of two linears, and a text class.

    Mapping of the text model, ModelConfig --llava--> Mapping of the whole
    config.json of a tower                 --tower_of--> VisionConfig, or the reason against it

The tower is read in front of its last norm (`vision_feature_layer` -1), which is therefore not on
the path, and neither is SigLIP's pooling head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipeline.config.model import ModelConfig, VisionConfig
from pipeline.config.vision import NORM_EPS, encoder_of
from pipeline.huggingface.rules import Mapping, Rule, split_and_join_qkv

TOWER, PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
# What is computed here: another value is another model.
FIXED: dict[str, Any] = {
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}
TOWER_FIXED: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": NORM_EPS,
    "num_channels": 3,
}
# What transformers takes where a folder does not say: releases before 5 wrote only what differs, so
# that google/siglip-base-patch16-224 says nothing at all of its tower.
UNSAID: dict[str, Any] = {
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
TOWER_UNSAID = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
}
# Why other towers cannot be read.
OTHER_TOWERS = {
    "clip_vision_model": "CLIP has a class token, a norm in front of its blocks and quick_gelu",
    "siglip2_vision_model": "SigLIP 2 resizes its positions to each picture's shape",
    "dinov2": "DINOv2 has a class token and scales its layers",
}


def llava(model: ModelConfig, text: Mapping) -> Mapping:
    """The whole model's class.

    Args:
        model: with a picture encoder.
        text: of the same model without it.
    """
    # Llava ties its head to embed_tokens, by a name that GPT-2 does not have: written out.
    is_tied = model.tied_embeddings and not text.is_transposed
    tie = {"tie_word_embeddings": is_tied}
    vision, encoder = model.vision, encoder_of(model)
    rules = [
        _of_text(rule, writes_head=model.tied_embeddings and not is_tied) for rule in text.rules
    ]
    width = vision.hidden_size
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": encoder.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "vision_use_head": False,
        **TOWER_FIXED,
    }
    config = {
        "model_type": "llava",
        "text_config": {"architectures": [text.architecture], **text.config, **tie},
        "vision_config": tower,
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
        **FIXED,
        **tie,
    }
    idle: dict[str, tuple[tuple[int, ...], float]] = {
        f"{TOWER}post_layernorm.weight": ((width,), 1.0),
        f"{TOWER}post_layernorm.bias": ((width,), 0.0),
    }
    return Mapping(
        "LlavaForConditionalGeneration",
        config,
        [*rules, *tower_rules(model, TOWER), *_projector_rules()],
        {_text_name(name): shape for name, shape in text.zeros.items()},
        idle,
    )


def tower_rules(model: ModelConfig, tower: str) -> list[Rule]:
    """Of the encoder's parameters, without the projector.

    Args:
        tower: what their names begin with.
    """
    edge, patch = model.vision.patch_size, f"{tower}embeddings.patch_embedding"
    rules = [
        # A convolution whose steps are as long as its window: channel, row, column.
        Rule(
            "vision.patch.weight",
            (f"{patch}.weight",),
            lambda w: [w.reshape(-1, 3, edge, edge)],
            lambda parts: parts[0].flatten(1),
        ),
        Rule("vision.patch.bias", (f"{patch}.bias",)),
        Rule("vision.position.weight", (f"{tower}embeddings.position_embedding.weight",)),
    ]
    qkv = split_and_join_qkv(encoder_of(model))
    same = {
        "self_attention.linear_proj": "self_attn.out_proj",
        "input_layernorm": "layer_norm1",
        "pre_mlp_layernorm": "layer_norm2",
        "mlp.linear_fc1": "mlp.fc1",
        "mlp.linear_fc2": "mlp.fc2",
    }
    for layer in range(model.vision.num_layers):
        ours, theirs = f"vision.layers.{layer}", f"{tower}encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            parts = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
            rules.append(Rule(f"{ours}.self_attention.linear_qkv.{kind}", parts, *qkv))
            rules += [
                Rule(f"{ours}.{a}.{kind}", (f"{theirs}.{b}.{kind}",)) for a, b in same.items()
            ]
    return rules


def _projector_rules() -> list[Rule]:
    return [
        Rule(f"vision.linear_{number}.{kind}", (f"{PROJECTOR}linear_{number}.{kind}",))
        for number in "12"
        for kind in ("weight", "bias")
    ]


def _of_text(rule: Rule, *, writes_head: bool) -> Rule:
    """A text model's rule under Llava's names; the word embedding's twice where it is the head."""
    theirs = tuple(map(_text_name, rule.theirs))
    if rule.name != "embedding.word.weight" or not writes_head:
        return replace(rule, theirs=theirs)
    return Rule(rule.name, (*theirs, "lm_head.weight"), lambda whole: [whole, whole])


def _text_name(name: str) -> str:
    if name == "lm_head.weight":
        return name
    return f"model.language_model.{name.removeprefix('transformer.').removeprefix('model.')}"


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    """The text model's part of a Llava's config.json.

    Raises:
        ValueError: the rest computes otherwise; with the reason.
    """
    for key, value in FIXED.items():
        if (found := config.get(key, UNSAID.get(key, value))) != value:
            unsaid = "" if key in config else ", which transformers takes where nothing is said"
            raise ValueError(f"it has {key}={found!r}{unsaid}; computed here is {value!r}.")
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ValueError("it has no text_config.")
    ties = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return text if ties is None else {**text, "tie_word_embeddings": ties}


def tower_of(config: Any) -> VisionConfig:
    """The encoder of a tower's config.json.

    Raises:
        ValueError: it is not SigLIP's, or computes otherwise; with the reason.
    """
    if not isinstance(config, dict):
        raise ValueError("it has no vision_config.")
    config = {**TOWER_UNSAID, **config}
    if reason := next(_against(config), None):
        raise ValueError(reason)
    edge = config["patch_size"]
    return VisionConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        ffn_hidden_size=config["intermediate_size"],
        # Pixels beyond the last whole patch are never read: 384 by 14 is 378.
        image_size=config["image_size"] // edge * edge,
        patch_size=edge,
    )


def _against(config: dict[str, Any]) -> Iterator[str]:
    """Why a tower, whose sizes are all there, cannot be read."""
    kind = config.get("model_type")
    if kind != "siglip_vision_model":
        reason = OTHER_TOWERS.get(str(kind), "its blocks are not known here")
        yield f"its tower is a {kind!r}: {reason}. SigLIP's (siglip_vision_model) can be read."
        return
    sizes = {key: config[key] for key in TOWER_UNSAID}
    wrong = [f"{k}={v!r}" for k, v in sizes.items() if type(v) is not int or not 1 <= v < 2**31]
    if wrong:
        yield f"its tower has {', '.join(wrong)}, where whole numbers are read."
    for key, value in TOWER_FIXED.items():
        if config.get(key, value) != value:
            yield f"its tower has {key}={config[key]!r}; computed here is {value!r}."
