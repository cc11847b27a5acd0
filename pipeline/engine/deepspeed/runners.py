"""Which of DeepSpeed's engines runs a model, and the one set-up that both need."""

from __future__ import annotations

import pipeline.engine.deepspeed.environment  # noqa: F401

# isort: split
import deepspeed

from pipeline.config.choices import Precision
from pipeline.config.run_shape import RunShape
from pipeline.engine.deepspeed.plain import PlainRunner
from pipeline.engine.deepspeed.staged import StagedRunner
from pipeline.engine.runner import RunnerClass
from pipeline.errors import ConfigError


def choose_runner(shape: RunShape, precision: Precision) -> RunnerClass:
    """The runner of a layout; DeepSpeed takes over torch's process group.

    Raises:
        ConfigError: the device cannot compute in this precision.
    """
    is_fp16_supported = deepspeed.accelerator.get_accelerator().is_fp16_supported
    if precision is Precision.fp16 and not is_fp16_supported():
        raise ConfigError(
            "training.precision=fp16 is not supported on this device. Set "
            "training.precision=bf16 or fp32."
        )
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return StagedRunner if shape.sizes.pipeline > 1 else PlainRunner
