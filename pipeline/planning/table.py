"""A plan as lines for the terminal, at most 100 columns wide.

Plan --memory_lines, time_lines, cost_lines--> text
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.log import in_units
from pipeline.planning.job import Job
from pipeline.planning.memory import GIB, PARTS, StageMemory, most_loaded
from pipeline.planning.plan import FASTEST, PLANT_FACTOR, SLOWEST, Plan
from pipeline.planning.search import Layout

COLUMNS = 100
MOST_STAGES = 8
BAR = 30


def layout_line(job: Job) -> str:
    """Such as `1024 ranks = 8 data x 16 pipeline x 8 tensor parallel; ...`."""
    sizes, shape = job.shape.sizes, job.shape
    shared = f"{sizes.context} context x " if sizes.context > 1 else ""
    return (
        f"{shape.world_size} ranks = {sizes.data} data x {sizes.pipeline} pipeline x {shared}"
        f"{sizes.tensor} tensor parallel; {shape.total_steps} steps, {shape.total_tokens:,} tokens"
    )


def plan_lines(plan: Plan) -> Iterator[str]:
    """The whole plan but for what search and advice add."""
    job, step = plan.job, plan.job.shape.at(plan.job.shape.total_steps)
    yield (
        f"{job.model.name}: {plan.num_parameters:,} parameters, {plan.num_trained:,} trained; "
        f"a checkpoint takes {in_units(plan.checkpoint_bytes)}"
    )
    yield layout_line(job)
    yield (
        f"step: {step.global_batch_size} sequences of {step.seq_len}, {step.num_micro_batches} "
        f"micro-batches of {job.shape.micro_batch_size} a rank; "
        f"zero_stage={job.shape.zero_stage}, recompute={job.training.recompute.name}"
    )
    yield ""
    yield from memory_lines(plan)
    yield ""
    yield from time_lines(plan)
    yield ""
    yield from cost_lines(plan)


def memory_lines(plan: Plan) -> Iterator[str]:
    """GiB by stage and cause; of many stages the first, the last and the most loaded."""
    names = ["weights", "gradients", "optimizer", "activations", "temporaries", "CUDA", "total"]
    widths = [10, 11, 11, 12, 12, 7, 9]
    yield "GiB at its peak".ljust(22) + "".join(f"{n:>{w}}" for n, w in zip(names, widths))
    for memory in _shown(plan.memory):
        values = [*(getattr(memory, part) for part in PARTS), memory.overhead, memory.total]
        layers = plan.job.stages[memory.stage].layers
        label = f"stage {memory.stage}: {layers} blocks"
        yield label.ljust(22) + "".join(f"{v / GIB:{w}.2f}" for v, w in zip(values, widths))
    hidden = len(plan.memory) - len(_shown(plan.memory))
    if hidden:
        yield f"  and {hidden} stages between them, that need less than the most loaded"
    worst = plan.worst
    verdict = "it fits" if plan.fits else "IT DOES NOT FIT"
    yield (
        f"{plan.device.name} has {plan.device.memory_gib:.1f} GiB: {verdict} (stage {worst.stage}, "
        f"{worst.total / GIB:.1f} GiB, at its peak in the {worst.moment})"
    )


def _shown(memory: list[StageMemory]) -> list[StageMemory]:
    """The first half, the last half, and the most loaded stage."""
    if len(memory) <= MOST_STAGES:
        return memory
    half = MOST_STAGES // 2
    shown = [*memory[: half - 1], most_loaded(memory), *memory[-half:]]
    chosen = {m.stage: m for m in shown}
    return [chosen[stage] for stage in sorted(chosen)]


def time_lines(plan: Plan) -> Iterator[str]:
    """Seconds of a step by cause, and the throughput as a range."""
    total = plan.time.total
    low, high = SLOWEST * plan.tokens_per_s, FASTEST * plan.tokens_per_s
    yield (
        f"a step takes {total:.3g} s; real runs {total / FASTEST:.3g} to {total / SLOWEST:.3g} s"
    )
    for cause, seconds in plan.time.by_cause.items():
        if seconds > 0:
            bar = "#" * round(BAR * seconds / total)
            yield f"  {cause:<18}{seconds:10.4f} s {seconds / total:5.0%} {bar}".rstrip()
    yield (
        f"{low:,.0f} to {high:,.0f} tokens/s; "
        f"MFU {SLOWEST * plan.mfu:.1%} to {FASTEST * plan.mfu:.1%} (by the formula {plan.mfu:.1%})"
    )


def cost_lines(plan: Plan) -> Iterator[str]:
    """Days, device-hours, rent and energy of the whole run."""
    days = plan.hours / 24
    yield (
        f"the run: {days / FASTEST:,.1f} to {days / SLOWEST:,.1f} days, by the formula "
        f"{days:,.1f}: {plan.device_hours:,.0f} device-hours,"
    )
    yield (
        f"  {plan.usd:,.0f} USD at {plan.device.usd_per_hour:.2f} a device-hour, "
        f"{plan.megawatt_hours:,.1f} MWh at {plan.device.watts:.0f} W times {PLANT_FACTOR};"
    )
    yield "  evaluations, checkpoints and restarts come on top"


def layout_lines(found: list[Layout], count: int, *, most: int = 10) -> Iterator[str]:
    """The fastest layouts."""
    yield f"{count} legal layouts, {len(found)} of them fit; the fastest:"
    yield f"{'tokens/s':>12} {'MFU':>6} {'GiB':>6}  settings"
    for layout in found[:most]:
        plan = layout.plan
        head = f"{plan.tokens_per_s:12,.0f} {plan.mfu:6.1%} {plan.worst.total / GIB:6.1f}  "
        settings = layout.settings or "(as it is set)"
        yield from _wrapped(head, settings.split(" "))
    if not found:
        yield "  none: the device is too small, or there are too few"


def _wrapped(head: str, words: list[str]) -> Iterator[str]:
    """Words behind a head, at most COLUMNS wide, broken between words."""
    line = head
    for word in words:
        if len(line) + len(word) > COLUMNS and line.strip():
            yield line.rstrip()
            line = " " * len(head)
        line += word + " "
    yield line.rstrip()
