"""From a run's settings to its parts: which section each of them is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape
from pipeline.data.datasets import Dataset
from pipeline.data.loader import Loader
from pipeline.data.validation import beginnings
from pipeline.distributed.layout import ParallelLayout
from pipeline.distributed.timeouts import step_timeout_s
from pipeline.engine.deepspeed.runners import choose_runner
from pipeline.engine.engine import Engine
from pipeline.model.architecture import Architecture
from pipeline.model.stage_io import StageSchema
from pipeline.probing.while_training import HeadProbe, LensProbe
from pipeline.resilience.clock import Clock
from pipeline.tracking.metrics import Metrics
from pipeline.training.looks import Look, Looks
from pipeline.training.privacy import noise_key
from pipeline.training.profile import StepProfile
from pipeline.training.state import TrainState
from pipeline.training.text_samples import TextSamples
from pipeline.training.watched_engine import WatchedEngine


def build_engine(cfg: PretrainConfig, shape: RunShape, layout: ParallelLayout) -> Engine:
    """An engine, with its initial weights. Collective: call on every rank."""
    return Engine(*_parts(cfg, shape, layout), **_sections(cfg, shape))


def build_watched_engine(
    cfg: PretrainConfig, shape: RunShape, layout: ParallelLayout, *, run_dir: Path
) -> WatchedEngine:
    """The engine of a run, which traces steps into run_dir. Collective: call on every rank."""
    profile = None
    if cfg.training.profile_steps is not None:
        first, last = cfg.training.profile_steps
        profile = StepProfile(
            run_dir,
            first=first,
            last=last,
            global_rank=layout.ranks.global_rank,
            device=layout.device,
        )
    return WatchedEngine(
        *_parts(cfg, shape, layout),
        **_sections(cfg, shape),
        noise_key="" if cfg.finetune.dp.clip_norm is None else noise_key(run_dir, layout),
        profile=profile,
        timeout_s=step_timeout_s(
            hang_timeout_s=cfg.resilience.hang_timeout_s,
            collective_timeout_s=cfg.resilience.collective_timeout_s,
        ),
    )


def _parts(
    cfg: PretrainConfig, shape: RunShape, layout: ParallelLayout
) -> tuple[Architecture, StageSchema, ParallelLayout]:
    """What an engine is made of."""
    architecture = Architecture(
        cfg.model,
        cfg.parallel,
        cfg.training.precision,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.padded_vocab_size,
        recompute=cfg.training.recompute,
        recompute_every=cfg.training.recompute_every,
        fp8=cfg.training.fp8,
    )
    return architecture, StageSchema.of(cfg.data, cfg.parallel, cfg.model), layout


def _sections(cfg: PretrainConfig, shape: RunShape) -> dict[str, Any]:
    """The settings that an engine is given, by the names of its arguments."""
    return {
        "runner_class": choose_runner(shape, cfg.training.precision),
        "shape": shape,
        "optimizer": cfg.optimizer,
        "schedule": cfg.schedule,
        "finetune": cfg.finetune,
        "seed": cfg.seed,
    }


def build_looks(
    cfg: PretrainConfig,
    *,
    engine: Engine,
    loader: Loader,
    held_out: Sequence[Dataset],
    metrics: Metrics,
    clock: Clock,
) -> Looks:
    """What the run looks at every so many steps; what it finds goes to `metrics`.

    Args:
        held_out: opened datasets, of which the first is read through the lens; none: nothing is.
    """
    schema, training = StageSchema.of(cfg.data, cfg.parallel, cfg.model), cfg.training
    looks: list[tuple[int, Look]] = []
    if training.probe_every:
        probes: list[HeadProbe | LensProbe] = [HeadProbe(engine, schema)]
        if held_out:
            text = beginnings(
                held_out[0],
                seq_len=engine.shape.seq_len,
                parts=schema.sequence_ranks,
                device=engine.layout.device,
                cfg=cfg.data,
            )
            probes.append(LensProbe(engine, schema, text))

        def look(state: TrainState) -> None:
            metrics.event(state, {n: v for probe in probes for n, v in probe.run().items()})

        looks.append((training.probe_every, look))
    if training.sample_every:
        texts = TextSamples(training, engine=engine, schema=schema, loader=loader, seed=cfg.seed)

        def write(state: TrainState) -> None:
            metrics.record_samples(state, texts.draw(state.step, alive=clock.alive))

        looks.append((training.sample_every, write))
    return Looks(looks, clock=clock)


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
        once_a_step=cfg.finetune.dp.clip_norm is not None,
    )
