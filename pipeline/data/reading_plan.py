"""What a run will read to its end, from settings and manifests alone.

Sampler + RunShape -> passes over each dataset, or where the data end before the run does
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.data import DataConfig
from pipeline.config.run_shape import RunShape
from pipeline.data.datasets import Dataset
from pipeline.data.sampler import Sampler
from pipeline.errors import DataUsedUp

# What a model learns from a text falls with every pass, and is little after four (Muennighoff et
# al. 2023, arXiv:2305.16264, section 6).
MANY_EPOCHS = 4.0


@dataclass(frozen=True)
class ReadingPlan:
    """Where a run's data take it."""

    epochs: dict[str, float] = field(default_factory=dict)
    """Dataset name to the passes over it when the run ends; empty where the data end before."""
    used_up: str | None = None
    """Why the data end before the run does; None where they do not."""
    changes: tuple[str, ...] = ()
    """What is otherwise than in the checkpoint, and allowed by data.allow_dataset_change."""
    sequences: int = 0
    """Of all datasets, each counted once."""

    def __str__(self) -> str:
        """Such as `0.82 epochs of train/web, 3.10 of train/code`."""
        first, *more = [f"{n:.2f} epochs of {name}" for name, n in self.epochs.items()] or ["none"]
        return ", ".join([first, *(text.replace(" epochs", "", 1) for text in more)])

    def warnings(self) -> list[str]:
        """Data that changed, and datasets that are read too often to teach much."""
        changed = [f"resuming with changed data: {change}" for change in self.changes]
        return changed + [
            f"dataset {name} will be read {passes:.1f} times; beyond {MANY_EPOCHS:.0f} passes a "
            "model learns little more from it. Lower its weight, shorten the run "
            "(training.total_steps), or prepare more text."
            for name, passes in self.epochs.items()
            if passes > MANY_EPOCHS
        ]


def plan_reading(
    cfg: DataConfig,
    datasets: Sequence[Dataset],
    *,
    shape: RunShape,
    seed: int,
    saved: dict[str, Any] | None = None,
) -> ReadingPlan:
    """The passes over each dataset when the run ends.

    Args:
        cfg: how datasets are mixed.
        datasets: of cfg.train; their manifests are enough.
        shape: length of the run and of its steps.
        seed: of the order.
        saved: the loader's state in the checkpoint that the run resumes; None: from the start.

    Raises:
        ConfigError, DataError: what the loader would refuse: weights, names in blend_schedule, a
            dataset without a sequence, other data than the checkpoint's.
    """
    sampler = Sampler(cfg, datasets, seq_len=shape.seq_len, seed=seed)
    begin = sampler.position(saved) if saved else sampler.start()
    changes = tuple(sampler.changes(saved)) if saved else ()
    sizes = [order.epoch_size for order in sampler.orders]
    try:
        end = sampler.seek(shape.total_steps, shape, begin)
    except DataUsedUp as error:
        return ReadingPlan(used_up=str(error), changes=changes, sequences=sum(sizes))
    passes = {d.name: n / size for d, n, size in zip(sampler.datasets, end.ledger, sizes)}
    epochs = {d.name: passes[d.name] for d in datasets}
    return ReadingPlan(epochs, changes=changes, sequences=sum(sizes))
