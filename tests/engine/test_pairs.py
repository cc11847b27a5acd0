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
# Pairs that the rules accept and no case has: one -> the others, each pair once.
UNTRIED: dict[str, str] = {
    "TP": "selective",
    "SP": "selective full",
    "1F1B": "selective full",
    "DualPipeV": "top-1 selective full FP8",
    "CP": "top-1 FP8",
    "EP": "top-1 ZeRO-3 selective documents FP8",
    "top-1": "ZeRO-3 selective full bf16 fp16 documents Muon FP8",
    "ZeRO-2": "full",
    "ZeRO-3": "selective",
    "selective": "fp16 Muon",
    "full": "Muon",
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
        test_muon.FAST, test_muon.ALL,
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


def test_what_goes_together_and_has_no_case_is_known() -> None:
    """Each was right alone, and wrong beside another: a reduction that one adds, the other leaves out.

    A case that is taken away is missed here; a new one takes its pairs from UNTRIED.
    """
    tried = [ways_of(case, world_size) for world_size, case in cases()]
    assert set().union(*tried) == set(WAYS)
    without: dict[str, list[str]] = {}
    for one, other in combinations(WAYS, 2):
        if not any({one, other} <= ways for ways in tried) and go_together(one, other):
            without.setdefault(one, []).append(other)
    assert {one: " ".join(others) for one, others in without.items()} == UNTRIED
