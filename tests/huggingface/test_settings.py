"""config.json as our settings: every key that means something is used or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.model import ModelConfig
from pipeline.errors import CheckpointError
from pipeline.huggingface.mapping import mapping_for
from pipeline.huggingface.settings import read_model_config
from tests.support.exported import EXPORTED
from tests.support.llama_folder import LLAMA


@pytest.mark.parametrize("name", EXPORTED)
def test_settings_read_from_a_folder_map_back_to_it(name: str, exported: tuple[Path, dict]) -> None:
    """pipeline.hf_import prints settings that train the same architecture."""
    model = read_model_config(exported[0] / name)
    written = json.loads((exported[0] / name / "config.json").read_text())
    again = mapping_for(model)
    free = {"architectures", "bos_token_id", "eos_token_id", "torch_dtype", "initializer_range"}
    assert {k: v for k, v in again.config.items() if k not in free} == {
        k: v for k, v in written.items() if k not in free
    }


GPT2: dict[str, Any] = {
    "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64,
}  # fmt: skip
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": None}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 8}
QWEN3_MOE = {
    **QWEN3, "model_type": "qwen3_moe", "moe_intermediate_size": 24, "num_experts": 4,
    "num_experts_per_tok": 2, "norm_topk_prob": True,
}  # fmt: skip
ROPE3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(folder: Path, config: dict[str, Any]) -> ModelConfig:
    """What a folder with this config.json is in our settings."""
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_config(folder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({**LLAMA, "attn_logit_softcapping": 50.0}, "does not know: attn_logit_softcapping=50.0"),
        ({**LLAMA, "query_pre_attn_scalar": 256}, "query_pre_attn_scalar=256"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({**LLAMA, "layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({**LLAMA, "mlp_bias": True}, "biases in the MLP but not in attention"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "factor=None"),
        ({**LLAMA, "rope_scaling": {**ROPE3, "original_max_position_embeddings": 64, "low_freq_factor": 2}},
         "low_freq_factor=2"),
        ({**LLAMA, "rope_scaling": ROPE3}, "original_max_position_embeddings=None"),
        ({**LLAMA, "rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 2]}}, "mrope_section"),
        ({**LLAMA, "quantization_config": {"quant_method": "awq"}}, "weights are quantised"),
        ({**MISTRAL, "sliding_window": 32}, "sliding_window=32"),
        ({**MISTRAL, "sliding_window": 32, "use_sliding_window": False}, "sliding_window=32"),
        ({**LLAMA, "model_type": "mistral"}, "lacks sliding_window"),
        ({**LLAMA, "sliding_window": 32}, "sliding_window=32"),
        ({**MIXTRAL, "sliding_window": 0}, "sliding_window=0"),
        ({**MISTRAL, "sliding_window": 64, "max_position_embeddings": None}, "sliding_window=64"),
        ({**MISTRAL, "attention_bias": True}, "attention_bias=True"),
        ({**LLAMA, "is_causal": False}, "is_causal=False"),
        ({**QWEN3, "rope_theta": None}, "lacks rope_theta"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": None}}, "factor=None"),
        ({**LLAMA, "model_type": "bloom"}, "bloom.*ALiBi"),
        ({**QWEN3, "use_sliding_window": True, "sliding_window": 32}, "sliding_window=32"),
        ({**QWEN3, "head_dim": None}, "lacks head_dim"),
        ({**MIXTRAL, "num_experts_per_tok": 1}, "gives the weight 1"),
        ({**QWEN3_MOE, "norm_topk_prob": False}, "norm_topk_prob=False"),
        ({**QWEN3_MOE, "mlp_only_layers": [0]}, "layers without experts"),
        ({**QWEN3_MOE, "decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({**QWEN3_MOE, "shared_expert_intermediate_size": 24}, "shared_expert_intermediate_size=24"),
        ({**LLAMA, "num_local_experts": 8}, "num_local_experts=8"),
        ({**GPT2, "activation_function": "relu"}, "activation_function='relu'"),
        ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights=False"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({**LLAMA, "model_type": "olmo2"}, "olmo2.*norms behind attention"),
        ({**LLAMA, "model_type": "bert"}, "of type 'bert'"),
        ({k: v for k, v in LLAMA.items() if k != "intermediate_size"}, "lacks intermediate_size"),
        ({k: v for k, v in GPT2.items() if k not in ("n_layer", "n_head")}, "lacks n_layer, n_head"),
        ({k: v for k, v in MIXTRAL.items() if k != "rope_theta"}, "lacks rope_theta"),
        ({**LLAMA, "hidden_size": "32"}, "hidden_size is '32'"),
        ({}, "of type 'None'"),
        ([], "holds no settings: it is"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """A key that is dropped changes the model without a word."""
    with pytest.raises(CheckpointError, match=reason):
        read(tmp_path, config)


@pytest.mark.parametrize(
    "config",
    [
        MISTRAL,
        {**MISTRAL, "sliding_window": 64},
        {**QWEN3, "use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1},
        {**LLAMA, "pretraining_tp": 2, "attn_logit_softcapping": None, "use_cache": True},
        {**LLAMA, "layer_types": ["full_attention"] * 2},
    ],
)
def test_what_changes_nothing_is_no_reason(config: dict[str, Any], tmp_path: Path) -> None:
    """A window that no position leaves, a switch that is off, how to generate."""
    model = read(tmp_path, config)
    assert (model.num_layers, model.rope_theta, model.norm_eps) == (2, 5e5, 1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {**LLAMA, "rope_theta": None, "max_position_embeddings": None, "head_dim": None},
        {**LLAMA, "tie_word_embeddings": None, "rope_parameters": {"rope_theta": None}},
        {**GPT2, "n_positions": None, "layer_norm_epsilon": None, "tie_word_embeddings": None},
    ],
)
def test_null_is_as_if_the_key_were_not_there(config: dict[str, Any], tmp_path: Path) -> None:
    """It ended in a traceback, or in a GPT-2 whose head was not the word embedding."""
    without = {key: value for key, value in config.items() if value is not None}
    without.pop("rope_parameters", None)
    assert read(tmp_path, config) == read(tmp_path, without)


def test_both_spellings_of_the_number_of_experts_are_read(tmp_path: Path) -> None:
    """transformers writes num_local_experts since 5.8."""
    later = {key: value for key, value in QWEN3_MOE.items() if key != "num_experts"}
    expected = read(tmp_path, QWEN3_MOE)
    assert expected.moe.num_experts == 4 and expected.ffn_hidden_size == 24
    assert read(tmp_path, {**later, "num_local_experts": 4}) == expected


def test_both_spellings_of_rotary_positions_are_read(tmp_path: Path) -> None:
    """rope_theta and rope_scaling until transformers 4, rope_parameters since 5."""
    scaling = {**ROPE3, "original_max_position_embeddings": 32}
    former = read(tmp_path, {**LLAMA, "rope_scaling": scaling})
    later = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    assert former.rope_original_max_seq_len == 32 and former.rope_theta == 5e5
    assert read(tmp_path, {**later, "rope_parameters": {"rope_theta": 5e5, **scaling}}) == former
