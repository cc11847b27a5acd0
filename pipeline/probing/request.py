"""What is looked at, checked before any process group forms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.evaluation import Evaluation
from pipeline.config.model import ModelConfig
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import CheckpointError, ConfigError
from pipeline.files import open_regular


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
    lens: Path | None = None
    """Translators of a tuned lens: the file they are read from, or written to if they are trained;
    null: there is none.
    """
    lens_steps: int = 0
    """Steps that the translators are trained; 0: they are read."""


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


def translator_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name in the file -> shape, of the translators of a model."""
    size = model.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(model.num_layers - 1):
        shapes |= {f"layers.{block}.weight": (size, size), f"layers.{block}.bias": (size,)}
    return shapes


def check_translators(path: Path, model: ModelConfig) -> None:
    """Refuse a file that does not hold the translators of such a model.

    Raises:
        CheckpointError: it cannot be read, or they are those of another model.
    """
    from safetensors import safe_open

    try:
        open_regular(path).close()  # a pipe would be waited for, without end
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {name: tuple(s.get_shape()) for name, s in slices.items()}
            dtypes = {s.get_dtype() for s in slices.values()}
    except Exception as error:  # safetensors' own error type is not public
        raise CheckpointError(f"tuned_lens={path} cannot be read: {error}.") from error
    wanted = translator_shapes(model)
    if found != wanted or dtypes - {"F32"}:
        first = next(iter(wanted.items()), None)
        raise CheckpointError(
            f"tuned_lens={path} holds {len(found)} tensors {sorted(dtypes)}; those of this model "
            f"are {len(wanted)} of fp32, the first {first}. Train some: train_lens=250."
        )
