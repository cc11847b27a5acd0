"""The weights of a Hugging Face folder, under our names and in our layouts."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.config.model import ModelConfig
from pipeline.config.same_model import another_model, differing
from pipeline.errors import CheckpointError
from pipeline.huggingface.mapping import mapping_for
from pipeline.huggingface.settings import read_model_config
from pipeline.huggingface.tensor_files import check_tensors


class HuggingFaceWeights:
    """The weights of a Hugging Face folder under our names."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Compare the folder's architecture with `model`.

        Raises:
            CheckpointError: they differ; the message gives the settings to change.
        """
        self.folder = folder
        theirs = read_model_config(folder)
        if differ := differing(theirs, model):
            raise CheckpointError(another_model(folder, theirs, differ))
        mapping = mapping_for(theirs)
        self._rules = {rule.name: rule for rule in mapping.rules}
        self._files = check_tensors(folder, mapping)
        for name in mapping.zeros:
            if name in self._files and bool(self._read(name).any()):
                raise CheckpointError(
                    f"{folder} has a bias {name} that this model has not: its weights cannot be "
                    "taken over."
                )
        self._check_head(theirs)

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
            CheckpointError: it is missing or cannot be read.
        """
        if name not in self._rules:
            raise CheckpointError(f"{self.folder} has nothing for {name}.")
        rule = self._rules[name]
        return rule.join([self._read(theirs) for theirs in rule.theirs]).float()

    def _read(self, name: str) -> Tensor:
        """One tensor of the folder, which has it as a floating-point number."""
        path, spelt, _ = self._files[name]
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(spelt)
        except Exception as error:  # safetensors' own error type is not public
            raise CheckpointError(f"{path}: {spelt} cannot be read: {error}.") from error
        return tensor
