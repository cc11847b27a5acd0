"""The plan's memory against what a rank of the real engine holds on a device that computes nothing.

    python -m tests.rehearsed_presets                        every dense preset, kind of rank and recompute: 180 rehearsals
    python -m tests.rehearsed_presets --models gpt2-124m,modern-7b --processes 8

One rank of each kind: without a pipeline at ZeRO-1 and -2, and the first, a middle and the last stage of one. A line for
each comparison, the widest ones at the end; exit code 1 when one is off by 5 % or more.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import derive
from pipeline.planning.job import Job
from pipeline.planning.memory import memory_of_stages
from pipeline.rehearsal.dry_run import RankProcess, rehearse

FILES = (cli.CONF_DIR / "model").glob("*.yaml")
# Of text, and dense.
PRESETS = sorted(
    path.stem for path in FILES if not {"moe:", "vision:"} & set(path.read_text().split())
)
RECOMPUTE = ("none", "full")
# Ranks along the pipeline, the stage that is looked at, the ZeRO stage.
KINDS = {
    "zero 1": (1, 0, 1),
    "zero 2": (1, 0, 2),
    "first": (3, 0, 1),
    "middle": (3, 1, 1),
    "last": (3, 2, 1),
}
MOST = 0.05

Case = tuple[str, str, str]
"""Preset, kind of rank, recompute."""


def error(
    model: str, kind: str, recompute: str, *settings: str, process: RankProcess | None = None
) -> float:
    """By how much the plan is above the rehearsed peak, 0.01 is 1 %."""
    pipeline, stage, zero = KINDS[kind]
    tensor = 8 if model == "gpt3-175b" else 1
    if model == "tiny":  # four blocks, and a head as heavy as 42
        pipeline, stage = min(pipeline, 2), min(stage, 1)
    words = [
        "data.path=none", f"model={model}", f"training.recompute={recompute}",
        f"parallel.zero_stage={zero}", f"parallel.pipeline_parallel_size={pipeline}",
        f"parallel.tensor_parallel_size={tensor}", f"parallel.sequence_parallel={tensor > 1}",
        "training.micro_batch_size=2", f"training.global_batch_size={8 * pipeline}", *settings,
    ]  # fmt: skip
    cfg = cli.compose(PretrainConfig, words, config="pretrain")
    vocab_size = cfg.model.vocab_size or 50257
    world_size = 2 * pipeline * tensor
    shape = derive(cfg, world_size=world_size, tokenizer_vocab_size=vocab_size)
    report = rehearse(
        cfg,
        rank=stage * 2 * tensor,
        world_size=world_size,
        tokenizer_vocab_size=vocab_size,
        num_micro_batches=max(2, pipeline),
        process=process,
    )
    assert report.pipeline_rank == stage
    planned = memory_of_stages(Job.of(cfg, shape))[stage]
    return planned.tensors / report.step_peak_bytes[-1] - 1


def cases(models: Sequence[str] = PRESETS) -> list[Case]:
    """Every comparison."""
    return [(model, kind, recompute) for model in models for kind in KINDS for recompute in RECOMPUTE]  # fmt: skip


def slice_of_cases() -> list[Case]:
    """Every preset once, every kind with every recompute at least once."""
    kinds = list(KINDS)
    return [
        (model, kinds[i % len(kinds)], RECOMPUTE[i // len(kinds) % len(RECOMPUTE)])
        for i, model in enumerate(PRESETS)
    ]


def _error_in(idle: SimpleQueue[RankProcess], case: Case) -> float:
    """The error of a case, rehearsed in one of the idle processes."""
    process = idle.get()
    try:
        return error(*case, process=process)
    finally:
        idle.put(process)


def main(argv: Sequence[str]) -> int:
    """Exit code 1 when the plan is off somewhere."""
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsed_presets", description=__doc__.splitlines()[0])  # fmt: skip
    parser.add_argument("--models", default=",".join(PRESETS), help="separated by commas")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(argv)
    models = options.models.split(",")
    if unknown := sorted(set(models) - set(PRESETS)):
        parser.error(f"no such preset: {', '.join(unknown)}; there are {', '.join(PRESETS)}")
    wanted = cases(models)
    errors: dict[Case, float] = {}
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        idle: SimpleQueue[RankProcess] = SimpleQueue()
        for _ in range(options.processes):
            idle.put(stack.enter_context(RankProcess()))
        pool = stack.enter_context(ThreadPoolExecutor(options.processes))
        for case, found in zip(wanted, pool.map(lambda case: _error_in(idle, case), wanted)):
            errors[case] = found
            print(f"{found:+7.2%}  {case[0]}, {case[1]}, recompute {case[2]}", flush=True)
    wrong = [case for case, found in errors.items() if abs(found) >= MOST]
    least, most = min(errors.values()), max(errors.values())
    print(f"{len(errors)} comparisons, {least:+.2%} to {most:+.2%}; {len(wrong)} off by {MOST:.0%} or more")  # fmt: skip
    print(f"in {(time.monotonic() - began) / 60:.0f} minutes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
