"""Start from a Hugging Face folder: its settings, and its weights one parameter at a time.

    python -m pipeline.hf_import FOLDER > conf/model/mine.yaml
    python -m pipeline.train model=mine checkpoint.init_from=FOLDER ...

Reads GPT-2, Llama, Mistral, Qwen2, Qwen3, Mixtral and Qwen3-MoE folders with safetensors, without
transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline import cli
from pipeline.huggingface.reader import HuggingFaceWeights
from pipeline.huggingface.settings import read_model_config


@dataclass
class ImportConfig:
    """Show a Hugging Face folder's architecture as settings."""

    folder: str = "???"
    """A local GPT-2, Llama, Mistral, Qwen2, Qwen3, Mixtral or Qwen3-MoE folder."""


def main(cfg: ImportConfig) -> int:
    """Print conf/model/<name>.yaml for the folder.

    Raises:
        CheckpointError: it has weights that `checkpoint.init_from` could not take over.
    """
    folder = Path(cfg.folder)
    model = read_model_config(folder)
    if any(folder.glob("*.safetensors")):
        HuggingFaceWeights(folder, model)
    print(cli.to_yaml(model), end="")
    return 0


if __name__ == "__main__":
    cli.run(main, ImportConfig, config="hf_import", positional=("folder",))
