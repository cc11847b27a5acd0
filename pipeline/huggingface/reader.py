"""The weights of a Hugging Face folder, under our names and in our layouts."""

from __future__ import annotations

import dataclasses
import operator
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.config.choices import Position, RopeScaling
from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import resolve
from pipeline.errors import CheckpointError
from pipeline.files import open_regular, parse_json, read_file
from pipeline.huggingface.mapping import mapping_for
from pipeline.huggingface.settings import read_model_config
from pipeline.shapes import misfits

# Ends of names of what is computed from settings: causal masks, rotary frequencies.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
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
        for name in mapping.zeros:
            if name in self._files and bool(self._read(name).any()):
                raise CheckpointError(
                    f"{folder} has a bias {name} that this model has not: its weights cannot be "
                    "taken over."
                )
        self._check_head(theirs)
        used = {name for rule in mapping.rules for name in rule.theirs} | mapping.zeros.keys()
        self._check_unused(sorted(self._files.keys() - used - {"lm_head.weight"}))

    def _check_head(self, model: ModelConfig) -> None:
        """Refuse a head of its own under a config that says it is the word embedding.

        transformers 4 drops such a head, transformers 5 keeps it: only the owner knows.
        """
        rules = self._rules["embedding.word.weight"]
        if not model.tied_embeddings or "lm_head.weight" not in self._files:
            return
        if not torch.equal(self._read("lm_head.weight"), self._read(rules.theirs[0])):
            raise CheckpointError(
                f"{self.folder}/config.json says tie_word_embeddings=true, but lm_head.weight is "
                "not the word embedding. To take that head over, set tie_word_embeddings to false "
                "there; to go on without it, save the folder again without lm_head.weight."
            )

    def _check_unused(self, names: list[str]) -> None:
        """Refuse tensors that nothing of ours is made of; masks, rotary tables are no weights."""
        unused = [name for name in names if not name.endswith(BUFFERS)]
        if unused:
            more = f" and {len(unused) - 3} more" if unused[3:] else ""
            raise CheckpointError(
                f"{self.folder} holds {', '.join(unused[:3])}{more}, which this program would not "
                "use: it is another model than its config.json says. Its weights cannot be taken "
                "over."
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
        whole = self.whole(name)
        if name.startswith(("embedding.", "head.")) and whole.shape[0] >= shape[0]:
            whole = whole[: shape[0]]
        if tuple(whole.shape) != shape:
            raise CheckpointError(
                f"{name} is {tuple(whole.shape)} in {self.folder} and {shape} in this model."
            )
        return whole

    def whole(self, name: str) -> Tensor:
        """A whole parameter as the folder has it, fp32.

        Raises:
            CheckpointError: it is missing or quantised.
        """
        if name not in self._rules:
            raise CheckpointError(f"{self.folder} has nothing for {name}.")
        rule = self._rules[name]
        return rule.join([self._read(theirs) for theirs in rule.theirs]).float()

    def _read(self, name: str) -> Tensor:
        """One tensor of the folder, refused if it is missing or quantised."""
        if name not in self._files:
            raise CheckpointError(f"{self.folder} has no tensor {name}.")
        path, spelt = self._files[name]
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(spelt)
        except Exception as error:  # safetensors' own error type is not public
            raise CheckpointError(f"{path}: {spelt} cannot be read: {error}.") from error
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(
                f"{name} in {self.folder} is of type {str(tensor.dtype).removeprefix('torch.')}: "
                "the weights are quantised. Take the folder they were made from, or write them as "
                "bf16 with transformers first."
            )
        return tensor


def _comparable(model: ModelConfig) -> dict[str, Any]:
    """Settings that must agree, with their defaults worked out."""
    values = {key: value for key, value in dataclasses.asdict(model).items() if key not in FREE}
    sizes = dataclasses.asdict(resolve(model))
    values |= {key: size for key, size in sizes.items() if key in values}
    experts = ["num_experts"]
    experts += ["top_k", "shared_expert_ffn_hidden_size"] if model.moe.num_experts else []
    values |= {f"moe.{key}": getattr(model.moe, key) for key in experts}
    if model.rope_scaling is RopeScaling.none:
        del values["rope_scaling_factor"]
    if model.rope_scaling is not RopeScaling.llama3:
        del values["rope_original_max_seq_len"]
    if model.position is not Position.rope:
        del values["rope_theta"]
    for key in (  # tables are cut, or the shape check says what is missing
        "vocab_size",
        "max_seq_len",
    ):
        del values[key]
    return values


def _spelt(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else getattr(value, "name", str(value))


def _index(folder: Path) -> dict[str, tuple[Path, str]]:
    """Tensor name, as of the model with a head, to its safetensors file and its name there."""
    index: dict[str, tuple[Path, str]] = {}
    for path in _files(folder):
        try:
            open_regular(path).close()  # a pipe would be waited for, without end
            with safe_open(path, "pt") as file:
                index.update({name: (path, name) for name in file.keys()})
        except Exception as error:  # safetensors' own error type is not public
            raise CheckpointError(f"{path} cannot be read: {error}.") from error
    prefix = next(
        (p for name in index for p in ("transformer.", "model.") if name.startswith(p)), None
    )
    if prefix is None:  # written from the bare model, as OpenAI's GPT-2 folders are
        prefix = "transformer." if "wte.weight" in index else "model."
        head = index.pop("lm_head.weight", None)
        index = {prefix + name: place for name, place in index.items()}
        index |= {"lm_head.weight": head} if head else {}
    return index


def _files(folder: Path) -> list[Path]:
    """The files that transformers reads: those of the index, or model.safetensors, or all.

    Folders may hold a second copy in its author's spelling (Mistral's consolidated.safetensors).
    """
    path = folder / "model.safetensors.index.json"
    if path.exists():
        try:
            content = parse_json(read_file(path))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}.") from None
        if wrong := next(misfits(content, {"weight_map": {str: str}}), None):
            raise CheckpointError(f"{path} is no index of weights: {wrong}.")
        names = sorted(set(content["weight_map"].values()))
        if strange := [name for name in names if not re.fullmatch(r"\w[\w.-]*\.safetensors", name)]:
            raise CheckpointError(
                f"{path} names {strange[0]!r}, which is no *.safetensors file of its folder."
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} has no *.safetensors. Convert pytorch_model.bin with transformers' "
            "from_pretrained and save_pretrained."
        )
    return files
