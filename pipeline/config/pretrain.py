"""The root of a run's settings; each section has its file beside this one.

    conf/pretrain.yaml, groups  --hydra-->  PretrainConfig  --run_shape.derive-->  RunShape
    (values)                                (the schema)                           (derived numbers)

A field is followed by its meaning, unit, and what null or 0 does; `python -m pipeline.train --help`
prints them all on one page. Components receive their own section, never the root. Nothing is
changed after composition; numbers that follow from others live in `run_shape.RunShape`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from pipeline.config.data import DataConfig
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig
from pipeline.config.operation import CheckpointConfig, ResilienceConfig, TrackingConfig
from pipeline.config.training import OptimizerConfig, ParallelConfig, ScheduleConfig, TrainingConfig


@dataclass
class PretrainConfig:
    """The root of conf/pretrain.yaml."""

    name: str = MISSING
    """Run name; the run lives in <runs_dir>/<name>."""
    runs_dir: str = "runs"
    """Folder that holds the runs."""
    seed: int = 1234
    """Seeds weights, data order and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
