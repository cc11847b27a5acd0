"""From a run's settings to its parts: which section each of them is given."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape
from pipeline.data.loader import Loader
from pipeline.distributed.layout import ParallelLayout
from pipeline.engine.engine import Engine
from pipeline.model.architecture import Architecture
from pipeline.model.stage_io import StageSchema


def build_engine(cfg: PretrainConfig, shape: RunShape, layout: ParallelLayout) -> Engine:
    """The engine of a run, with its initial weights. Collective: call on every rank."""
    architecture = Architecture(
        cfg.model,
        cfg.parallel,
        cfg.training.precision,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.padded_vocab_size,
        recompute=cfg.training.recompute,
        recompute_every=cfg.training.recompute_every,
    )
    return Engine(
        architecture,
        StageSchema.of(cfg.data, cfg.parallel),
        layout,
        shape=shape,
        optimizer=cfg.optimizer,
        schedule=cfg.schedule,
        finetune=cfg.finetune,
        seed=cfg.seed,
    )


def build_loader(
    cfg: PretrainConfig, shape: RunShape, layout: ParallelLayout, *, cache_dir: Path
) -> Loader:
    """The batches of this rank, from the first step on."""
    return Loader(
        cfg.data,
        shape=shape,
        seed=cfg.seed,
        data_rank=layout.data.rank,
        device=layout.device,
        cache_dir=cache_dir,
        reads_tokens=layout.pipeline.rank in (0, shape.sizes.pipeline - 1),
    )
