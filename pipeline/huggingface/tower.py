"""The vision tower in a SigLIP folder, under our names.

    SiglipModel or SiglipVisionModel folder --> VisionConfig, the encoder's parameters one by one

What a run's encoder begins with (checkpoint.init_tower), and a part of a joined folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import resolve
from pipeline.config.parameter_names import parameter_shapes
from pipeline.errors import CheckpointError
from pipeline.huggingface.json_files import read_json
from pipeline.huggingface.llava import tower_of, tower_rules
from pipeline.huggingface.rules import Rule
from pipeline.huggingface.tensor_files import FLOATS, index

if TYPE_CHECKING:
    from torch import Tensor


class Tower:
    """The picture encoder's parameters in a folder of SiglipModel or SiglipVisionModel."""

    def __init__(self, folder: Path) -> None:
        """Read its config.json and find its tensors.

        Raises:
            CheckpointError: it is no SigLIP tower, or lacks tensors; with the reason.
        """
        self.folder = folder
        config = read_json(folder / "config.json")
        try:
            self.vision = tower_of(config.get("vision_config", config))
        except ValueError as error:
            raise CheckpointError(f"{folder}/config.json: {error}") from None
        self._files = index(folder)
        patch = "embeddings.patch_embedding.weight"
        names = [name for name in self._files if name.endswith(patch)]
        if len(names) != 1:
            raise CheckpointError(f"{folder} has {len(names)} tensors {patch}, not one.")
        self._prefix = names[0].removesuffix(patch)

    def check(self, model: ModelConfig) -> None:
        """Raise CheckpointError unless the encoder of `model` is this one, with nothing missing."""
        ours = resolve(model).vision
        here = replace(model.vision, ffn_hidden_size=ours.ffn_hidden_size if ours else None)
        differ = {k: v for k, v in vars(self.vision).items() if v != getattr(here, k)}
        if differ:
            typed = " ".join(f"model.vision.{name}={value}" for name, value in differ.items())
            raise CheckpointError(f"{self.folder} is the tower of another encoder. Set {typed}.")
        self.tensors(model)

    def tensors(self, model: ModelConfig) -> dict[str, Callable[[], Tensor]]:
        """Canonical name to a function that reads the parameter, fp32, which checks its shape.

        Raises:
            CheckpointError: one is missing, or quantised.
        """
        # The vocabulary is no part of the encoder: one word stands for it.
        shapes = parameter_shapes(model, FinetuneConfig(), vocab_size=1)
        found: dict[str, Callable[[], Tensor]] = {}
        for rule in tower_rules(model, self._prefix):
            for theirs in rule.theirs:
                place = self._files.get(theirs)
                if place is None or place.dtype not in FLOATS:
                    what = "has no tensor" if place is None else "has as quantised"
                    raise CheckpointError(f"{self.folder} {what} {theirs}.")
            found[rule.name] = partial(self._joined, rule, shapes[rule.name])
        return found

    def _joined(self, rule: Rule, shape: tuple[int, ...]) -> Tensor:
        """A parameter of this shape of its parts, fp32."""
        import torch

        wanted = rule.split(torch.empty(shape, device="meta"))
        parts = [self._read(name) for name in rule.theirs]
        for name, part, like in zip(rule.theirs, parts, wanted, strict=True):
            if part.shape != like.shape:
                raise CheckpointError(
                    f"{self.folder}: {name} is {tuple(part.shape)}, where its config.json says "
                    f"{tuple(like.shape)}."
                )
        return rule.join(parts).float()

    def _read(self, name: str) -> Tensor:
        place = self._files[name]
        try:
            with safe_open(place.path, "pt") as file:
                tensor: Tensor = file.get_tensor(place.name)
        except Exception as error:  # safetensors' own error type is not public
            raise CheckpointError(f"{place.path}: {name} cannot be read: {error}.") from error
        return tensor
