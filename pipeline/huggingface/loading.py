"""Models and tokenizers of Hugging Face folders by transformers, for no more than they are.

A folder can ask transformers for other weights (adapter_config.json), for code of its own
(auto_map, custom_generate), for kernels to download, and for files anywhere. Code of a folder is
never run, the rest is refused, and nobody is asked whether it may.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import CheckpointError
from pipeline.files import open_regular
from pipeline.huggingface.json_files import read_json
from pipeline.huggingface.tensor_files import weight_files

if TYPE_CHECKING:
    import torch

_CODE = ("attn_implementation", "_attn_implementation", "experts_implementation")


def load_transformers(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A folder's model, ready to infer.

    Raises:
        CheckpointError: transformers cannot load it, or it asks for what a model does not need.
    """
    reads_pictures = check_folder(folder).get("model_type") == "llava"  # takes milliseconds
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}
    try:
        classes = AutoModelForImageTextToText if reads_pictures else AutoModelForCausalLM
        model: Any = classes.from_pretrained(folder, **options)
        return model.to(device).eval()
    except (MemoryError, torch.OutOfMemoryError):  # not the folder's fault
        raise
    except Exception as error:  # transformers raises whatever its parts do
        raise CheckpointError(
            f"transformers cannot load {folder}: {type(error).__name__}: {error}"
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    return _load_auto(folder, "tokenizer")


def load_processor(folder: Path) -> Any:
    """What turns texts and pictures into a model's input.

    Raises:
        CheckpointError: the folder has none that transformers can load.
    """
    return _load_auto(folder, "processor")


def _load_auto(folder: Path, kind: str) -> Any:
    """What transformers' AutoTokenizer, AutoProcessor makes of a folder."""
    check_folder(folder)
    import transformers

    try:
        auto = getattr(transformers, f"Auto{kind.capitalize()}")
        return auto.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{folder} has no {kind} that transformers can load: {type(error).__name__}: {error}"
        ) from error


def check_folder(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        CheckpointError: loading the folder would do more than read its files.
    """
    weight_files(folder)  # safetensors, of this folder, and no adapter's, which may lie anywhere
    try:
        for path in folder.iterdir():
            if not path.is_dir():
                open_regular(path).close()  # a pipe would be waited for, without end
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}.") from None
    config = read_json(folder / "config.json")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for key, part in ((key, part) for part in parts for key in _CODE):
        named = part.get(key)
        if named is not None and (not isinstance(named, str) or "/" in named):
            raise CheckpointError(
                f"{folder}/config.json asks for code from elsewhere: {key} is {named!r}. Take the "
                "line out."
            )
    return config


def holds_template(folder: Path) -> bool:
    """Whether a folder has a chat template, in a file of its own or in the tokenizer's settings."""
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        settings = read_json(folder / "tokenizer_config.json")
    except CheckpointError:  # the tokenizer's loading says what is wrong
        return True
    return settings.get("chat_template") is not None
