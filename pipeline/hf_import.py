"""Start from a Hugging Face folder: its settings, and its weights one parameter at a time.

    python -m pipeline.hf_import FOLDER > conf/model/mine.yaml
    python -m pipeline.train model=mine checkpoint.init_from=FOLDER ...
    python -m pipeline.hf_import FOLDER tower=SIGLIP output=BOTH > conf/model/mine.yaml

Reads GPT-2, Llama, Mistral, Qwen2, Qwen3, Mixtral and Qwen3-MoE folders with safetensors, and Llava
folders of these with a SigLIP tower, without transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline import cli
from pipeline.checkpoint import folder as folders
from pipeline.errors import ConfigError
from pipeline.files import check_writable
from pipeline.huggingface.reader import HuggingFaceWeights
from pipeline.huggingface.settings import read_model_config
from pipeline.huggingface.writer import DType


@dataclass
class ImportConfig:
    """Show a Hugging Face folder's architecture as settings."""

    folder: str = "???"
    """A local GPT-2, Llama, Mistral, Qwen2, Qwen3, Mixtral or Qwen3-MoE folder, or a Llava folder
    of one of them with a SigLIP tower.
    """
    tower: str | None = None
    """A local SigLIP folder whose picture encoder the text model of `folder` is given, with a fresh
    projector; both are written to `output`. null: the folder as it is.
    """
    output: str | None = None
    """Folder to write, new or empty; goes with `tower`."""
    image_token: str = "<|image|>"
    """Token of the tokenizer that will stand for a patch; goes with `tower`."""
    dtype: DType = DType.bf16
    """Type of the written weights; goes with `tower`."""


def main(cfg: ImportConfig) -> int:
    """Print conf/model/<name>.yaml for the folder.

    Raises:
        CheckpointError: it has weights that `checkpoint.init_from` could not take over.
    """
    folder = Path(cfg.folder)
    if (cfg.tower is None) != (cfg.output is None):
        raise ConfigError("tower= and output= go together: what to add, and where both will be.")
    if cfg.tower is not None and cfg.output is not None:
        from pipeline.huggingface.join import join

        output = Path(cfg.output)
        folders.check_new(output)
        check_writable(output / "config.json", "output=")
        join(folder, Path(cfg.tower), output, image_token=cfg.image_token, dtype=cfg.dtype)
        folder = output
    model = read_model_config(folder)
    if any(folder.glob("*.safetensors")):
        HuggingFaceWeights(folder, model)
    print(cli.to_yaml(model), end="")
    return 0


if __name__ == "__main__":
    cli.run(main, ImportConfig, config="hf_import", positional=("folder",))
