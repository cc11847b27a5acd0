"""Hugging Face folders as models and weights of ours."""

from __future__ import annotations

import dataclasses
import json
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.choices import Activation, Normalization, Position, RopeScaling
from pipeline.config.model import ModelConfig, MoeConfig
from pipeline.errors import CheckpointError
from pipeline.huggingface.mapping import ACTIVATIONS, LLAMA3, mapping_for

if TYPE_CHECKING:
    from torch import Tensor

# Settings that say how to train, not what is computed.
FREE = {
    "name",
    "init",
    "init_std",
    "mup_base_hidden_size",
    "hidden_dropout",
    "attention_dropout",
    "backend",
    "compile",
}
FREE |= {"z_loss_coeff", "moe"}


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture of a Hugging Face folder in our settings.

    Raises:
        CheckpointError: no config.json, or a model of another kind.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}.") from None
    kind = config.get("model_type")
    name = folder.resolve().name
    if kind == "gpt2":
        return _from_gpt2(config, name, folder)
    if kind in ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"):
        return _from_llama(config, name, folder)
    raise CheckpointError(
        f"{folder} holds a model of type '{kind}'. Weights can be taken from gpt2, llama, qwen2, "
        "qwen3, mixtral and qwen3_moe."
    )


def _from_gpt2(config: dict[str, Any], name: str, folder: Path) -> ModelConfig:
    spellings = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {
        "gelu_pytorch_tanh": Activation.gelu_tanh
    }
    activation = spellings.get(config.get("activation_function", "gelu_new"))
    unlike = [
        key for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention") if config.get(key)
    ]
    if activation is None or unlike or config.get("scale_attn_weights", True) is not True:
        raise CheckpointError(
            f"{folder} is a GPT-2 variant that this program does not compute "
            f"({unlike or 'activation'})."
        )
    return ModelConfig(
        name=name,
        num_layers=config["n_layer"],
        hidden_size=config["n_embd"],
        num_attention_heads=config["n_head"],
        ffn_hidden_size=config.get("n_inner") or 4 * config["n_embd"],
        vocab_size=config["vocab_size"],
        max_seq_len=config.get("n_positions", 1024),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=activation,
        tied_embeddings=config.get("tie_word_embeddings", True),
    )


def _from_llama(config: dict[str, Any], name: str, folder: Path) -> ModelConfig:
    kind = config["model_type"]
    # transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling.
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling not in ("default", "linear", "llama3") or any(
        rope.get(k, v) != v for k, v in LLAMA3.items()
    ):
        raise CheckpointError(
            f"{folder} stretches its rotary positions in a way that this program does not compute: "
            f"{rope}."
        )
    if config.get("hidden_act", "silu") != "silu" or (
        config.get("use_sliding_window", kind == "mixtral") and config.get("sliding_window")
    ):
        raise CheckpointError(
            f"{folder} has another activation than silu, or a sliding window; this program "
            "computes neither."
        )
    if kind == "mixtral" and config["num_experts_per_tok"] == 1:
        raise CheckpointError(
            f"{folder} gives a single chosen expert the weight 1; this program does not."
        )
    if kind == "qwen3_moe":
        renormalises, several = (
            config.get("norm_topk_prob", False),
            config["num_experts_per_tok"] > 1,
        )
        if (
            renormalises != several
            or config.get("decoder_sparse_step", 1) != 1
            or config.get("mlp_only_layers")
        ):
            raise CheckpointError(
                f"{folder} has layers without experts, or norm_topk_prob={renormalises} with "
                f"num_experts_per_tok={config['num_experts_per_tok']}; this program computes "
                "neither."
            )
    bias = bool(config.get("mlp_bias", False))
    attention_bias = bool(config.get("attention_bias", kind == "qwen2"))
    if bias and not attention_bias:
        raise CheckpointError(
            f"{folder} has biases in its MLP but not in its attention; this program computes "
            "neither or both."
        )
    return ModelConfig(
        name=name,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_seq_len=config.get("max_position_embeddings", 2048),
        position=Position.rope,
        rope_theta=rope.get("rope_theta", 10000.0),
        rope_scaling=RopeScaling.none if scaling == "default" else RopeScaling[scaling],
        rope_scaling_factor=rope.get("factor", 1.0),
        rope_original_max_seq_len=rope.get("original_max_position_embeddings", 8192),
        normalization=Normalization.rmsnorm,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=Activation.swiglu,
        bias=bias,
        qkv_bias=attention_bias,
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        tied_embeddings=config.get("tie_word_embeddings", False),
        moe=_experts(config),
    )


def _experts(config: dict[str, Any]) -> MoeConfig:
    kind = config["model_type"]
    if kind == "mixtral":
        return MoeConfig(
            num_experts=config["num_local_experts"], top_k=config["num_experts_per_tok"]
        )
    if kind == "qwen3_moe":
        width = config["moe_intermediate_size"]
        return MoeConfig(
            num_experts=config["num_experts"],
            top_k=config["num_experts_per_tok"],
            ffn_hidden_size=width,
        )
    return MoeConfig()


class HuggingFaceWeights:
    """The weights of a Hugging Face folder under our names."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Compare the folder's architecture with `model`.

        Raises:
            CheckpointError: they differ; the message gives the settings to change.
        """
        self.folder = folder
        theirs = read_model_config(folder)
        here, there = _comparable(model), _comparable(theirs)
        differ = [key for key in there if here.get(key) != there[key]]
        if differ:
            wanted = " ".join(
                f"model.{key}={_spelt(operator.attrgetter(key)(theirs))}" for key in differ
            )
            raise CheckpointError(
                f"{folder} holds a model with other sizes. To train on with its weights, set "
                f"{wanted}"
            )
        mapping = mapping_for(theirs)
        self._rules = {rule.name: rule for rule in mapping.rules}
        self._files = _index(folder)
        # OpenAI's GPT-2 folders were written from the bare model, without the prefix of the one
        # with a head.
        self._is_bare = not any(name.startswith(("transformer.", "model.")) for name in self._files)
        for name in mapping.zeros:
            if name in self._files and bool(self._read(name).any()):
                raise CheckpointError(
                    f"{folder} has a bias {name} that this model has not: its weights cannot be "
                    "taken over."
                )

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A whole parameter, fp32.

        Args:
            name: canonical name.
            shape: what our model expects. Rows of the vocabulary or position table beyond it are
                left out.

        Raises:
            CheckpointError: it is missing or smaller.
        """
        if name not in self._rules:
            raise CheckpointError(f"{self.folder} has nothing for {name}.")
        rule = self._rules[name]
        whole = rule.join([self._read(theirs) for theirs in rule.theirs]).float()
        if name.startswith(("embedding.", "head.")) and whole.shape[0] >= shape[0]:
            whole = whole[: shape[0]]
        if tuple(whole.shape) != shape:
            raise CheckpointError(
                f"{name} is {tuple(whole.shape)} in {self.folder} and {shape} in this model."
            )
        return whole

    def _read(self, name: str) -> Tensor:
        from safetensors import safe_open

        if self._is_bare:
            name = name.partition(".")[2]
        if name not in self._files:
            raise CheckpointError(f"{self.folder} has no tensor {name}.")
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name)


def _comparable(model: ModelConfig) -> dict[str, Any]:
    """Settings that must agree, with their defaults worked out."""
    values = {key: value for key, value in dataclasses.asdict(model).items() if key not in FREE}
    values["head_dim"] = model.head_dim or model.hidden_size // model.num_attention_heads
    values["num_query_groups"] = model.num_query_groups or model.num_attention_heads
    values["ffn_hidden_size"] = model.ffn_hidden_size or 4 * model.hidden_size
    values["qkv_bias"] = model.bias if model.qkv_bias is None else model.qkv_bias
    values["moe.num_experts"], values["moe.top_k"] = model.moe.num_experts, model.moe.top_k
    if not model.moe.num_experts:
        del values["moe.top_k"]
    if model.rope_scaling is not RopeScaling.llama3:
        del values["rope_original_max_seq_len"]
    for key in (
        "vocab_size",
        "max_seq_len",
    ):  # tables are cut, or the shape check says what is missing
        del values[key]
    return values


def _spelt(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else getattr(value, "name", str(value))


def _index(folder: Path) -> dict[str, Path]:
    """Tensor name to the safetensors file that holds it."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} has no *.safetensors. Convert pytorch_model.bin with transformers' "
            "from_pretrained and save_pretrained."
        )
    index = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                index.update(dict.fromkeys(file.keys(), path))
        except Exception as error:  # safetensors' own error type is not public
            raise CheckpointError(f"{path} cannot be read: {error}.") from error
    return index
