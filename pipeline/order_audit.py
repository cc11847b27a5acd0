"""Prove that a run's data do not depend on its layout, without a GPU and before it starts.

    python -m pipeline.order_audit data.path=OUT layouts='[1x1,4x2,16x3]' steps=100
    python -m pipeline.order_audit experiment=gpt3-6.7b data.path=OUT start=50000 steps=10

A layout RxW is R data-parallel ranks whose steps are dealt to W workers that know nothing of each
other: each begins its every step from the numbers a checkpoint would hold. What all of them would
read is put together and hashed per step; the hash is the one the trainer logs with
tracking.sample_hash=true. Any setting of pipeline.train can be given.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline import cli, log
from pipeline.config.parallel_sizes import ParallelSizes
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape, derive
from pipeline.data.datasets import Dataset, describe, open_datasets
from pipeline.data.mixture import Samples
from pipeline.data.sampler import Sampler, hash_addresses
from pipeline.errors import ConfigError, DataError


@dataclass
class AuditConfig(PretrainConfig):
    """Settings of pipeline.order_audit, besides those of a run."""

    layouts: list[str] = field(default_factory=lambda: ["1x1", "4x2", "16x3"])
    """Layouts to compare: data-parallel ranks x workers."""
    start: int = 0
    """First step, counted from 0."""
    steps: int = 10
    """Number of steps."""
    quiet: bool = False
    """Print the verdict only."""


def main(cfg: AuditConfig) -> int:
    """Print each step's hash and the verdict; 1 when layouts part."""
    log.setup()
    if cfg.steps < 1 or cfg.start < 0 or not cfg.layouts:
        raise ConfigError(
            f"steps ({cfg.steps}) must be at least 1, start ({cfg.start}) at least 0, and layouts "
            "name one at least: nothing would be compared, and found equal."
        )
    layouts = [_parse(layout) for layout in cfg.layouts]
    with tempfile.TemporaryDirectory() as scratch:
        datasets = open_datasets(
            cfg.data.train, cfg=cfg.data, cache_dir=Path(cfg.data.cache_dir or scratch)
        )
    columns = {
        layout: hashes(cfg, datasets, *numbers) for layout, numbers in zip(cfg.layouts, layouts)
    }
    parted = [s for s in range(cfg.steps) if len({column[s] for column in columns.values()}) > 1]
    if not cfg.quiet:
        print("step      " + "".join(f"{layout:<18}" for layout in columns))
        for s in range(cfg.steps):
            mark = "  <- differ" if s in parted else ""
            print(
                f"{cfg.start + s:<10}"
                + "".join(f"{column[s]:<18}" for column in columns.values())
                + mark
            )
    if parted:
        print(
            f"NOT equal: the layouts part at step {cfg.start + parted[0]} ({len(parted)} of "
            f"{cfg.steps} steps differ)"
        )
        return 1
    print(
        f"equal: {', '.join(columns)} read the same samples in steps {cfg.start} to "
        f"{cfg.start + cfg.steps - 1}"
    )
    return 0


def hashes(cfg: AuditConfig, datasets: list[Dataset], ranks: int, workers: int) -> list[str]:
    """The hash of each step's samples, put together from what every rank and worker would read."""
    found = []
    shape = _shape(cfg, ranks)
    samplers = [
        Sampler(cfg.data, datasets, seq_len=shape.seq_len, seed=cfg.seed) for _ in range(workers)
    ]
    for step in range(cfg.start, cfg.start + cfg.steps):
        sampler = samplers[step % workers]
        state = json.dumps(sampler.state(sampler.seek(step, shape)))  # all that a worker knows
        samples, _ = sampler.advance(
            sampler.position(json.loads(state)), shape.at(step).num_samples
        )
        parts = [
            sampler.share(samples, data_rank=rank, data_parallel_size=ranks)
            for rank in range(ranks)
        ]
        found.append(
            _joined(sampler.identities, [(part, *sampler.addresses(part)) for part in parts])
        )
    return found


def _joined(identities: list[str], parts: list[tuple[Samples, np.ndarray, np.ndarray]]) -> str:
    """Hash of a step from the parts of its ranks."""
    columns = zip(
        *[
            (part.number, part.source, part.index, shard, sequence)
            for part, shard, sequence in parts
        ]
    )
    number, source, k, shard, sequence = (np.concatenate(column) for column in columns)
    if len(np.unique(number)) != len(number):
        raise DataError(
            "two ranks would read the same sample. This is a bug: "
            "please report it with your settings."
        )
    return hash_addresses(identities, Samples(number, source, k), shard, sequence)


def _shape(cfg: AuditConfig, ranks: int) -> RunShape:
    """The run's shape on `ranks` data-parallel ranks; micro-batches of 1 cut what a rank reads."""
    facts = describe(cfg.data)
    training = dataclasses.replace(cfg.training, micro_batch_size=1)
    return derive(
        dataclasses.replace(cfg, training=training),
        world_size=ParallelSizes.of(cfg.parallel, data=ranks).world_size,
        tokenizer_vocab_size=facts.vocab_size,
        row_tokens=facts.row_tokens,
        pictures=facts.row_pictures,
    )


def _parse(layout: str) -> tuple[int, int]:
    ranks, found, workers = layout.partition("x")
    if not (found and ranks.isdigit() and workers.isdigit() and int(ranks) and int(workers)):
        raise ConfigError(
            f"layout '{layout}' is not understood: write ranks x workers, for example 4x2."
        )
    return int(ranks), int(workers)


if __name__ == "__main__":
    cli.run(main, AuditConfig, config="pretrain")
