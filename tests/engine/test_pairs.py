"""Which two ways of training that go together are trained together, in some case of the layout suites."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from pipeline.config.choices import Float8, OptimizerName, PipelineSchedule, Precision, Recompute
from pipeline.config.run_shape import derive
from pipeline.errors import ConfigError
from tests.engine import test_context_parallel, test_equivalence, test_muon
from tests.model import test_float8, test_moe
from tests.support.equivalence import Case
from tests.support.layouts import VOCAB, config

# What each takes of a case, and what it cannot be without.
WAYS: dict[str, Case] = {
    "TP": dict(tp=2),
    "SP": dict(tp=2, sp=True),
    "1F1B": dict(pp=2),
    "DualPipeV": dict(pp=2, schedule="dualpipev"),
    "CP": dict(cp=2),
    "EP": dict(model="moe", ep=2),
    "top-1": dict(model="moe-switch"),
    **{f"ZeRO-{stage}": dict(zero=stage) for stage in range(4)},
    **{name: dict(recompute=name) for name in ("selective", "full")},
    **{name: dict(precision=name) for name in ("bf16", "fp16")},
    "documents": dict(documents=True),
    "Muon": dict(optimizer="muon"),
    "FP8": dict(precision="bf16", fp8="rowwise"),
}
# Ways to make a pair legal: experts under TP need SP, and at ZeRO-3 EP = TP.
HELPS: tuple[Case, ...] = (dict(), dict(tp=2, sp=True))


def ways_of(case: Case, world_size: int) -> set[str]:
    """What a case trains with; ConfigError where its settings do not go together."""
    cfg = config(**{key: value for key, value in case.items() if key != "masked"})
    shape = derive(cfg, world_size=world_size, tokenizer_vocab_size=VOCAB)
    parallel, training = cfg.parallel, cfg.training
    is_dual = parallel.pipeline_schedule is PipelineSchedule["dualpipev"]
    found = {
        "TP": parallel.tensor_parallel_size > 1,
        "SP": parallel.sequence_parallel,
        "1F1B": parallel.pipeline_parallel_size > 1 and not is_dual,
        "DualPipeV": is_dual,
        "CP": parallel.context_parallel_size > 1,
        "EP": parallel.expert_parallel_size > 1,
        "top-1": cfg.model.moe.num_experts > 0 and cfg.model.moe.top_k == 1,
        "documents": cfg.data.mask_documents,
        "Muon": cfg.optimizer.name is OptimizerName["muon"],
        "FP8": training.fp8 is not Float8.none,
        f"ZeRO-{shape.zero_stage}": True,  # the stage that runs: alone in fp32 it is none
        training.recompute.name: training.recompute is not Recompute.none,
        training.precision.name: training.precision is not Precision.fp32,
    }
    return {name for name, is_so in found.items() if is_so}


def cases() -> Iterator[tuple[int, Case]]:
    """(world size, case) of every suite that compares with plain torch."""
    tables: list[dict[int, list[Any]]] = [
        test_equivalence.FAST, test_equivalence.ALL, test_context_parallel.CASES, test_float8.CASES,
        test_muon.FAST, test_muon.ALL, {4: test_moe.AMONG_OTHERS},
    ]  # fmt: skip
    tables += [
        {size: [dict(model=model, **case) for case in found] for size, found in table.items()}
        for model, table in (
            ("moe-whole", test_moe.SPREAD),
            ("moe", test_moe.LAYOUTS),
            ("moe-switch", test_moe.LAYOUTS),
        )
    ]
    for table in tables:
        for world_size, found in table.items():
            yield from ((world_size, case) for case in found)


def go_together(one: str, other: str) -> bool:
    """Whether the rules accept a run with both, at some size of at most eight ranks."""
    left, right = WAYS[one], WAYS[other]
    for help_ in HELPS:
        merged = {"model": "modern", **left, **right, **help_}
        if any(merged[key] != value for way in (left, right) for key, value in way.items() if key != "model"):  # fmt: skip
            continue
        if {one, other} == {"EP", "top-1"}:
            merged["model"] = "moe-switch"
        elif "model" in left:
            merged["model"] = left["model"]
        for world_size in (1, 2, 4, 8):
            try:
                if {one, other} <= ways_of(merged, world_size):
                    return True
            except ConfigError:
                continue
    return False


def test_what_goes_together_is_tried_together() -> None:
    """Each was right alone, and wrong beside another: a reduction that one adds, the other leaves out.

    A new way, or a rule that is lifted, needs a case for each pair that it makes; one case can have many.
    """
    tried = [ways_of(case, world_size) for world_size, case in cases()]
    assert set().union(*tried) == set(WAYS)
    without = [
        pair for pair in combinations(WAYS, 2)
        if not any(set(pair) <= ways for ways in tried) and go_together(*pair)
    ]  # fmt: skip
    assert without == []
