"""The weights of a Hugging Face folder, under our names and in our layouts."""

from __future__ import annotations

import dataclasses
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.choices import RopeScaling
from pipeline.config.model import ModelConfig
from pipeline.errors import CheckpointError
from pipeline.huggingface.mapping import mapping_for
from pipeline.huggingface.settings import read_model_config

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
    "compile",
}
FREE |= {"z_loss_coeff", "moe"}


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
