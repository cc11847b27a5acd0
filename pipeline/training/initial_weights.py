"""Start from weights that exist: another run's, or a Hugging Face folder's, at any layout."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint import restore
from pipeline.checkpoint.agreement import Agreement
from pipeline.engine.weights import Weights
from pipeline.errors import CheckpointError
from pipeline.huggingface.reader import HuggingFaceWeights
from pipeline.model.fragments import chunks_of


def load_weights(weights: Weights, path: Path) -> Path:
    """Start from the weights of a run, a checkpoint or a Hugging Face folder; the folder read.

    Collective: call on every rank.

    Raises:
        CheckpointError: the folder is neither, is damaged, or its model is not this one.
    """
    ranks = Agreement(weights.layout.host_group)
    if (path / "config.json").is_file():
        ranks.agree(lambda: import_weights(weights, path))
    else:
        path = ranks.on_main(lambda: folders.find(path))
        if problems := ranks.damage(path):
            raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}.")
        ranks.agree(lambda: restore.read_weights(weights, path))
    weights.publish_weights()
    return path


def import_weights(weights: Weights, folder: Path) -> None:
    """Fill this rank's weights from a Hugging Face folder, one whole parameter at a time."""
    source = HuggingFaceWeights(folder, weights.model)
    for fragment in weights.fragments():
        whole = source.tensor(fragment.name, fragment.partition.global_shape)
        for chunk in chunks_of(fragment, ["weight"]):
            place = tuple(
                slice(o, o + n) for o, n in zip(chunk.offsets, chunk.data.shape, strict=True)
            )
            chunk.data.copy_(whole[place])
