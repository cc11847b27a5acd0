"""What a sampler is asked: the settings, and what is wrong with them before a model is loaded.

GenerateConfig --check_drawing--> numbers that draw --check_model--> a model that can be asked so
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.adapters import find_base, recorded_base
from pipeline.checkpoint.record import CHAT_TEMPLATE, read_record
from pipeline.errors import CheckpointError, ConfigError
from pipeline.huggingface.loading import check_folder, holds_template

NO_TEMPLATE = (
    "this model has no chat template: it was not trained on dialogues (data_prep.conversations). "
    "Give it a text to go on with: pretrain generate MODEL prompt=..."
)


@dataclass
class GenerateConfig:
    """Sample text."""

    checkpoint: str = "???"
    """A run folder (its newest checkpoint), one checkpoint, or a Hugging Face folder."""
    prompt: str = ""
    """Text to continue; empty: the start of a document."""
    image: str | None = None
    """A png, jpeg or webp file that the prompt, or the first turn of a chat, is about. In a chat,
    `/image FILE` shows more of them.
    """
    file: str | None = None
    """Text file with one prompt a line; replaces `prompt`."""
    interactive: bool = False
    """Ask for prompts on the terminal until end of file."""
    chat: bool = False
    """Talk on the terminal until end of file, by the model's chat template; a model without one
    goes on with the text that you and it have written so far.
    """
    max_new_tokens: int = 128
    """Longest continuation, tokens; it ends earlier with the document."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token every time."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability; 1: all."""
    num_samples: int = 1
    """Continuations of each prompt."""
    batch_size: int = 16
    """Continuations that are computed together."""
    stop: list[str] = field(default_factory=list)
    """A continuation ends with the first of these strings."""
    seed: int = 1234
    """Of what is drawn."""


def check_drawing(cfg: GenerateConfig) -> None:
    """Raise ConfigError where nothing can be drawn so."""
    if not 0 <= cfg.temperature < math.inf or not 0 < cfg.top_p <= 1 or cfg.top_k < 0:
        raise ConfigError(
            f"temperature ({cfg.temperature}) and top_k ({cfg.top_k}) must be at least 0, "
            f"top_p ({cfg.top_p}) in (0, 1]."
        )
    if min(cfg.num_samples, cfg.batch_size, cfg.max_new_tokens) < 1:
        raise ConfigError(
            f"num_samples ({cfg.num_samples}), batch_size ({cfg.batch_size}) and max_new_tokens "
            f"({cfg.max_new_tokens}) must be at least 1."
        )
    if not -(2**63) <= cfg.seed < 2**64:
        raise ConfigError(f"seed ({cfg.seed}) must be a number of 64 bits, such as 1234.")
    if "" in cfg.stop:
        raise ConfigError("stop holds an empty text, which every text ends with: leave it out.")
    ways = {"prompt": cfg.prompt, "file": cfg.file, "interactive": cfg.interactive,
            "chat": cfg.chat}  # fmt: skip
    if len(asked := [name for name, value in ways.items() if value]) > 1:
        raise ConfigError(
            f"{' and '.join(asked)} are several ways to ask; one of them would have no effect. "
            "Set one."
        )
    if cfg.num_samples > 1 and (cfg.interactive or cfg.chat):
        raise ConfigError(
            f"num_samples={cfg.num_samples} has no effect with {asked[0]}=true, where each line "
            "has one answer. Leave it out."
        )


def check_model(cfg: GenerateConfig, *, needs_template: bool = False) -> None:
    """Raise CheckpointError or ConfigError where, by its small files, no model can be asked so.

    Args:
        needs_template: it must answer, not go on with a text; one that is shown a picture must.
    """
    path = Path(cfg.checkpoint)
    is_theirs = (path / "config.json").is_file()
    if (is_theirs or cfg.image) and importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "a Hugging Face folder is sampled, and a picture shown, by transformers, which is not "
            'installed: pip install -e ".[hf]".'
        )
    if is_theirs:
        reads_pictures = check_folder(path).get("model_type") == "llava"
        has_template = holds_template(path)
    else:
        folder = folders.find(path)
        record = read_record(folder)
        reads_pictures = bool(record.model().vision.num_layers)
        has_template = (folder / CHAT_TEMPLATE).is_file()
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json: it can be asked nothing.")
        if (base := recorded_base(record)) is not None:
            find_base(base)
    if cfg.image and not reads_pictures:
        raise ConfigError(
            f"image={cfg.image} has no effect: this model reads no pictures. Leave it out."
        )
    if (needs_template or cfg.image) and not has_template:
        raise ConfigError(NO_TEMPLATE)
