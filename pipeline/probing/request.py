"""What is looked at, checked before any process group forms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.choices import NormPlacement
from pipeline.config.evaluation import Evaluation
from pipeline.config.model import ModelConfig
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """A model, and what it reads."""

    evaluation: Evaluation
    tokenizer: Tokenizer
    longest: int
    """Tokens of the longest sequences that the model was trained on."""
    cache_dir: Path
    """For shards that are not local."""
    prompt: list[int] | None = None
    """Ids of the text that is looked at; null: held-out data."""
    patching: tuple[list[int], int] | None = None
    """Ids of another prompt, as many, and of the answer that is asked for after both."""
    ablates: bool = False


def check_model(model: ModelConfig) -> None:
    """Refuse a model whose head does not read a sum of what its blocks add."""
    if model.norm_placement is NormPlacement.post:
        raise ConfigError(
            "model.norm_placement is post: behind each sum of such a model stands a norm, so no "
            "head reads a sum of what the blocks add, and neither lens nor attribution is defined. "
            "Models with norm_placement=pre are probed."
        )


def encode_prompt(
    tokenizer: Tokenizer, text: str, *, longest: int, key: str = "prompt"
) -> list[int]:
    """Ids of a prompt.

    Args:
        longest: tokens that the model takes.
        key: the setting, for errors.

    Raises:
        ConfigError: it has less than two tokens, or too many.
    """
    ids = tokenizer.encode(text)
    if not 2 <= len(ids) <= longest:
        raise ConfigError(
            f"{key} has {len(ids)} tokens; it must have 2 (one that predicts, one that is "
            f"predicted) to {longest}, as many as the model takes."
        )
    return ids


def encode_patching(
    tokenizer: Tokenizer, prompt: list[int] | None, *, patch_into: str, answer: str, longest: int
) -> tuple[list[int], int]:
    """Ids of the other prompt, and of the answer; arguments as above.

    Raises:
        ConfigError: something is missing, or the prompts are not of one length.
    """
    if prompt is None or not patch_into or not answer:
        raise ConfigError(
            "patching needs prompt (what is put in), patch_into (the run it is put into) and "
            "answer (what is asked for after both); set all three."
        )
    other = encode_prompt(tokenizer, patch_into, longest=longest, key="patch_into")
    if len(other) != len(prompt):
        texts = [[tokenizer.decode([i]) for i in ids] for ids in (prompt, other)]
        raise ConfigError(
            f"prompt has {len(prompt)} tokens, patch_into {len(other)}: what passed by at a place "
            f"is put at the same place, so both must have as many. They are {texts[0]} and "
            f"{texts[1]}."
        )
    ids = tokenizer.encode(answer)
    if not ids:
        raise ConfigError(f"answer ({answer!r}) has no token.")
    return other, ids[0]
