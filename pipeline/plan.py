"""Would it fit, how fast would it be, what would it cost; and how else could it be laid out?

    python -m pipeline.plan model=gpt3-6.7b world_size=64 device=h100 training.total_tokens=300e9
    python -m pipeline.plan experiment=gpt3-175b world_size=1024 device=h100 search=true
    python -m pipeline.plan experiment=gpt3-175b world_size=1024 page=plan.html

Takes the settings of pipeline.train, of which only the model is needed: with data.path it also says
how often each dataset is read. Devices are conf/devices/*.yaml, and yours. What the numbers are
compared with: docs/plan.md. Pure arithmetic, imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape, derive
from pipeline.files import write_durably
from pipeline.planning import advice, page, table
from pipeline.planning.devices import load_device
from pipeline.planning.job import Job
from pipeline.planning.plan import Plan
from pipeline.planning.search import search

GPT2_VOCABULARY = 50257


@dataclass
class PlanConfig(PretrainConfig):
    """The settings of a run, how many ranks it will have, and of what."""

    world_size: int = 1
    """Ranks of the planned job: nodes times devices of a node."""
    device: str = "h100"
    """A name in conf/devices/, or the path of a yaml like those."""
    usd_per_hour: float | None = None
    """Rent of one device; null: the device's."""
    vocab_size: int | None = None
    """Of the tokenizer, where no data are given; null: the model's, or GPT-2's 50,257."""
    search: bool = False
    """Rank every legal layout on these devices."""
    page: str | None = None
    """Write the plan as a page with pictures to this file."""


def main(cfg: PlanConfig) -> None:
    """Print the plan.

    Raises:
        ConfigError: the settings contradict each other, or the device is not known.
    """
    device = load_device(cfg.device)
    if cfg.usd_per_hour is not None:
        device = replace(device, usd_per_hour=cfg.usd_per_hour)
    shape, reading = _shape_and_reading(cfg)
    plan = Plan(Job.of(cfg, shape), device)
    lines = list(table.plan_lines(plan))
    lines += [f"it reads {reading}"] if reading else []
    if not plan.fits:
        lines += ["", *advice.advice(cfg, shape, device).splitlines()[1:]]
    if cfg.search:
        found, count = search(cfg, shape, device)
        lines += ["", *table.layout_lines(found, count, plan)]
    print("\n".join(lines))
    if cfg.page:
        write_durably(Path(cfg.page), page.render(cfg, plan, lines).encode())


def _shape_and_reading(cfg: PlanConfig) -> tuple[RunShape, str]:
    """The run's numbers, and the passes over each dataset, where data are given."""
    if not cfg.data.train:
        vocab_size = cfg.vocab_size or cfg.model.vocab_size or GPT2_VOCABULARY
        shape = derive(cfg, world_size=cfg.world_size, tokenizer_vocab_size=vocab_size)
        return shape, ""
    from pipeline.data.datasets import describe, follow_data
    from pipeline.data.reading_plan import plan_reading

    data = describe(cfg.data)
    settings = follow_data(cfg.data, data)
    shape = derive(
        replace(cfg, data=settings),
        world_size=cfg.world_size,
        tokenizer_vocab_size=data.vocab_size,
        row_tokens=data.row_tokens,
    )
    reading = plan_reading(settings, data.train, shape=shape, seed=cfg.seed)
    return shape, reading.used_up or str(reading)


if __name__ == "__main__":
    cli.run(main, PlanConfig, config="pretrain")
