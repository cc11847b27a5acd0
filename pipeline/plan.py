"""Would it fit, how fast would it be, what would it cost; and how else could it be laid out?

    python -m pipeline.plan model=gpt3-6.7b world_size=64 device=h100 training.total_tokens=300e9
    python -m pipeline.plan experiment=gpt3-175b world_size=1024 device=h100 search=true
    python -m pipeline.plan experiment=gpt3-175b world_size=1024 page=plan.html

Takes the settings of pipeline.train, of which only the model is needed: with data.path it also says
how often each dataset is read. Devices are conf/devices/*.yaml, and yours. What the numbers are
compared with: docs/plan.md. Pure arithmetic, imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import derive
from pipeline.errors import ConfigError
from pipeline.files import write_durably
from pipeline.planning import advice, page, table
from pipeline.planning.devices import load_device
from pipeline.planning.job import Job
from pipeline.planning.memory import GIB, memory_of_stages
from pipeline.planning.plan import Plan
from pipeline.planning.search import search
from pipeline.rehearsal.dry_run import GPT2_VOCABULARY, rehearse

if TYPE_CHECKING:
    from pipeline.data.datasets import DataSummary


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
    dry_run: bool = False
    """Rehearse one rank on a device that computes nothing, and compare its memory with the plan's;
    10 s, a C++ compiler and a CPU build of torch. ZeRO-3 and offloaded optimizers are refused.
    """
    rank: int = 0
    """Of dry_run: the global rank that is rehearsed."""


def main(cfg: PlanConfig) -> None:
    """Print the plan; with search=true the fastest layouts, also where the one set is not legal.

    Raises:
        ConfigError: the settings contradict each other, or the device is not known.
    """
    device = load_device(cfg.device)
    if cfg.rank and not cfg.dry_run:
        raise ConfigError(f"rank={cfg.rank} is which rank is rehearsed: it needs dry_run=true.")
    if cfg.usd_per_hour is not None:
        device = replace(device, usd_per_hour=cfg.usd_per_hour)
    cfg, data = _read_data(cfg)
    vocab_size = data.vocab_size if data else cfg.vocab_size or cfg.model.vocab_size
    vocab_size, lines = vocab_size or GPT2_VOCABULARY, []
    of_data: dict[str, Any] = {}
    if data is not None:
        of_data = {"row_tokens": data.row_tokens, "pictures": data.row_pictures}
    try:
        shape = derive(
            cfg,
            world_size=cfg.world_size,
            tokenizer_vocab_size=vocab_size,
            **of_data,
        )
    except ConfigError as error:
        if not cfg.search or cfg.page or cfg.dry_run:
            raise
        lines += [f"as it is set it would not start: {error}", ""]
    else:
        plan = Plan(Job.of(cfg, shape), device)
        lines += _plan_lines(cfg, plan, data)
        if cfg.dry_run:
            lines += [*_rehearsal_lines(cfg, plan, vocab_size), ""]
    if cfg.search:
        found = search(
            cfg,
            device,
            world_size=cfg.world_size,
            vocab_size=vocab_size,
            **of_data,
        )
        lines += table.layout_lines(*found)
    print("\n".join(lines))
    if cfg.page:
        write_durably(Path(cfg.page), page.render(cfg, plan, lines).encode())


def _plan_lines(cfg: PlanConfig, plan: Plan, data: DataSummary | None) -> Iterator[str]:
    """The plan of a legal layout: with what it reads, and what would make it fit."""
    yield from table.plan_lines(plan)
    if data is not None:
        from pipeline.data.reading_plan import plan_reading

        reading = plan_reading(cfg.data, data.train, shape=plan.job.shape, seed=cfg.seed)
        yield f"it reads {reading.used_up or reading}"
    if not plan.fits:
        yield ""
        yield from advice.advice(cfg, plan.job.shape, plan.device).splitlines()[1:]
    yield ""


def _rehearsal_lines(cfg: PlanConfig, plan: Plan, vocab_size: int) -> Iterator[str]:
    """What one rank did on a device that computes nothing: its memory beside the plan's count."""
    report = rehearse(
        cfg, rank=cfg.rank, world_size=cfg.world_size, tokenizer_vocab_size=vocab_size
    )
    peak = report.step_peak_bytes[-1]
    model = replace(plan.job.model, compile=False)  # as it is rehearsed
    planned = memory_of_stages(replace(plan.job, model=model))[report.pipeline_rank].tensors
    yield (
        f"rehearsed rank {report.rank} (data {report.data_rank}, pipeline {report.pipeline_rank}, "
        f"tensor {report.tensor_rank}): all on {', '.join(report.devices)}"
    )
    yield (
        f"  {peak / GIB:.2f} GiB of tensors at its peak, {planned / GIB:.2f} planned "
        f"({planned / peak - 1:+.1%}); the host reads {sum(report.host_reads.values())} numbers "
        "back in a step"
    )
    yield f"  a step of {report.num_micro_batches} micro-batches sends"
    for sent in report.collectives:
        yield (
            f"  {sent.count:6d} {sent.operation} of {sent.dtype} over {sent.group}: "
            f"{sent.num_bytes / GIB:.3f} GiB"
        )


def _read_data(cfg: PlanConfig) -> tuple[PlanConfig, DataSummary | None]:
    """The settings as the data have them, and what is known of the data, where they are given."""
    if not cfg.data.train:
        return cfg, None
    from pipeline.data.datasets import describe, follow_data

    data = describe(cfg.data)
    return replace(cfg, data=follow_data(cfg.data, data)), data


if __name__ == "__main__":
    cli.run(main, PlanConfig, config="pretrain")
