"""A text model and a SigLIP tower as one folder, which a run can begin with.

    TEXT folder, TOWER folder --one parameter at a time--> LlavaForConditionalGeneration folder

What was nowhere learned is the projector: its values are drawn, as a run would draw them. The
folder is a base like any other: frozen or trained, at any layout, with low-rank matrices or without
(LLaVA's first stage trains `vision.linear_?.*` alone).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig
from pipeline.config.parameter_names import parameter_shapes
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import CheckpointError, ConfigError
from pipeline.files import read_file, write_durably
from pipeline.huggingface.json_files import read_json, write_json
from pipeline.huggingface.mapping import mapping_for
from pipeline.huggingface.processor import write_processor
from pipeline.huggingface.reader import HuggingFaceWeights
from pipeline.huggingface.settings import read_model_config
from pipeline.huggingface.tower import Tower
from pipeline.huggingface.writer import DTYPES, DType, write_weights
from pipeline.model.initial_values import initialize
from pipeline.model.partition import Partition

SEED = 1234
"""Of the projector's values."""
TAKEN_OVER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
              "generation_config.json")  # fmt: skip


class JoinedTensors:
    """The weights of a text model, of a tower, and a fresh projector."""

    def __init__(self, text: HuggingFaceWeights, tower: Tower, model: ModelConfig) -> None:
        self._text, self._model = text, model
        assert model.vocab_size is not None
        self._shapes = parameter_shapes(model, FinetuneConfig(), vocab_size=model.vocab_size)
        self._tower = tower.tensors(model)

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole shape of an entry."""
        return self._shapes[name.removeprefix("weights/")]

    def tensor(self, name: str) -> Tensor:
        """A whole entry, fp32 on the host."""
        parameter, shape = name.removeprefix("weights/"), self.shape(name)
        if parameter in self._tower:
            return self._tower[parameter]()
        if not parameter.startswith("vision."):
            return self._text.tensor(parameter, shape)
        drawn = torch.empty(shape)
        initialize(drawn, parameter, Partition.of(shape), model=self._model, seed=SEED)
        return drawn


def join(text: Path, tower: Path, output: Path, *, image_token: str, dtype: DType) -> ModelConfig:
    """Write the folder of both; its architecture.

    Args:
        image_token: a token of the text model's tokenizer that will stand for a patch.

    Raises:
        CheckpointError: one of the folders cannot be read.
        ConfigError: the tokenizer has no such token, or no class computes the model.
    """
    tokenizer = _tokenizer(text)
    token = tokenizer.backend.token_to_id(image_token)
    if token is None:
        near = [name for name in tokenizer.special_names if "image" in name or "reserved" in name]
        raise ConfigError(
            f"the tokenizer of {text} has no token {image_token!r}. Name one that stands for "
            f"nothing else with image_token=...{', such as ' + ', '.join(near[:3]) if near else ''}"
            "; data_prep.conversations then needs the same."
        )
    alone = read_model_config(text)
    assert alone.vocab_size is not None
    if token >= alone.vocab_size:
        raise ConfigError(
            f"{image_token!r} is the id {token}, and the model of {text} has the ids 0 to "
            f"{alone.vocab_size - 1}. Name a token that it was made with, such as a reserved one."
        )
    reader = Tower(tower)
    model = replace(alone, vision=reader.vision)
    mapping = mapping_for(model)
    output.mkdir(parents=True, exist_ok=True)
    tensors = JoinedTensors(HuggingFaceWeights(text, alone), reader, model)
    write_weights(tensors, mapping, output, dtype=dtype)
    for name in TAKEN_OVER:
        if (text / name).is_file():
            write_durably(output / name, read_file(text / name))
    write_processor(model, output, tokenizer, token)
    theirs = read_json(text / "config.json")
    ends: dict[str, Any] = {
        key: theirs[key] for key in ("bos_token_id", "eos_token_id") if key in theirs
    }
    config = {
        "architectures": [mapping.architecture],
        **mapping.config,
        **ends,
        "image_token_index": token,
        "torch_dtype": DTYPES[dtype],
    }
    config["text_config"] = config["text_config"] | ends
    write_json(output / "config.json", config)  # last: without it the folder is no model
    return model


def _tokenizer(folder: Path) -> Tokenizer:
    try:
        raw = read_file(folder / "tokenizer.json")
    except OSError as error:
        raise CheckpointError(
            f"{folder} has no tokenizer.json that can be read: {error}."
        ) from None
    # Which token ends documents matters to nobody here; id 0 spares the guess, which may fail.
    return Tokenizer(raw, path=str(folder / "tokenizer.json"), eod=0)
