"""The rules of what goes on around training: checkpoints kept, who is told; see `rules`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from pipeline.config.data import DataConfig
from pipeline.config.operation import CheckpointConfig, TrackingConfig


def keeps_best(checkpoint: CheckpointConfig, data: DataConfig) -> Iterator[str]:
    """The best checkpoint is the best on something."""
    if checkpoint.keep_best and data.train and not data.validation:
        yield (
            "checkpoint.keep_best=true has nothing to compare by: no held-out data are named. Set "
            "data.validation='[{path: OUT/validation}]' (data.path=OUT does so), or "
            "checkpoint.keep_best=false."
        )


def tracker_is_installed(tracking: TrackingConfig) -> Iterator[str]:
    """TensorBoard is an extra: nobody waits for a run that would then tell nothing."""
    if tracking.tensorboard and importlib.util.find_spec("tensorboard") is None:
        yield (
            "tracking.tensorboard=true needs TensorBoard, which is not installed: "
            'pip install -e ".[tensorboard]", or set tracking.tensorboard=false.'
        )
