"""Every layout gives one result: losses and gradient norms of five steps against one process of plain torch.

AdamW hides a uniform error in the gradients' scale, so the gradient norm is compared too, before clipping. fp32: relative
1e-5. bf16: forward and backward round to 8 bits; ten steps stay within 5e-3 of the fp32 loss and 3e-2 of its norm, which a
wrong reduction (a factor, a missing rank) exceeds at the first step. fp16 has three bits more. One process does ten steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.config.choices import Init
from tests.support.equivalence import Case, check, compare
from tests.support.layouts import (
    FEW_STEPS,
    STEPS,
    batches,
    config,
    reference,
    train,
    train_all,
)
from tests.support.ranks import run_on_ranks

FAST: dict[int, list[Case]] = {
    1: [
        dict(model="gpt2"),
        dict(model="modern", precision="bf16", zero=2, recompute="selective", documents=True),
        dict(model="capped", zero=0),
        dict(model="gpt1"),
        dict(model="gpt2", zero=3, precision="fp16", recompute="full", documents=True),
    ],
    2: [
        dict(model="gpt2", tp=2, zero=2),
        dict(model="modern", tp=2, sp=True, documents=True),
        dict(model="gpt2", pp=2, masked=True),
        dict(model="gpt2", pp=2, documents=True, positions=True),
        dict(model="modern", zero=3, masked=True),
        dict(model="modern", pp=2, schedule="dualpipev", documents=True),
        dict(model="parallel", tp=2, zero=3, recompute="full"),
        dict(model="gpt2", pp=2, precision="fp16"),
        dict(model="modern", tp=2, zero=1, sp=True, precision="fp16"),
        dict(model="modern", cp=2, zero=2, documents=True, masked=True),
    ],
    4: [
        dict(model="gpt2", tp=2, pp=2, sp=True, micro_batch_size=4),
        dict(model="modern", tp=2, zero=3, sp=True),
        dict(model="gpt2", pp=2, micro_batch_size=1),
        dict(model="modern", tp=2, pp=2, precision="bf16"),
    ],
}
ALL: dict[int, list[Case]] = {
    1: [
        dict(model=m, zero=z)
        for m in ("gpt2", "modern", "gpt2-untied", "parallel", "mqa")
        for z in (0, 1, 3)
    ]
    + [dict(model="gpt2", zero=z, precision=p) for z in (1, 2, 3) for p in ("bf16", "fp16")]
    + [dict(model="modern", recompute=r) for r in ("selective", "full")]
    + [dict(model="gpt2", clip_grad=0.0, zero=z) for z in (0, 1)],
    # Every pair of model, ZeRO stage and sequence parallelism; beside copies of TP ranks ZeRO comes at four.
    2: [
        dict(model=m, tp=2, zero=z, sp=(number + z) % 2 == 1)
        for number, m in enumerate(("gpt2", "modern", "capped", "gpt1"))
        for z in (0, 1, 2, 3)
    ]
    + [dict(model=m, zero=z) for m in ("gpt2", "modern") for z in (0, 1, 2, 3)]
    + [
        dict(model=m, pp=2, schedule=s)
        for m in ("gpt2", "modern", "gpt2-untied")
        for s in ("1f1b", "dualpipev")
    ]
    + [
        dict(model="gpt2", pp=2, schedule=s, precision=p)
        for s in ("1f1b", "dualpipev")
        for p in ("bf16", "fp16")
    ]
    + [
        dict(model="modern", zero=z, precision=p)
        for z, p in zip((1, 2, 3, 3), ("bf16", "fp16") * 2)
    ]
    + [dict(model=m, pp=2) for m in ("gpt1", "mqa", "parallel", "odd")]
    + [dict(model="modern", pp=2, schedule="dualpipev", precision="fp16", recompute="selective")],
    3: [
        dict(model="odd", tp=3),
        dict(model="odd", zero=3, batch_size=12, masked=True),
        dict(model="gpt1", pp=3),
        dict(model="mqa", pp=3, documents=True),
        dict(model="parallel", zero=2, batch_size=12),
    ],
    4: [
        dict(model=m, pp=2, zero=1, schedule=s)
        for m in ("gpt2", "modern")
        for s in ("1f1b", "dualpipev")
    ]
    # Every pair of model, sequence parallelism and schedule.
    + [
        dict(model=m, tp=2, pp=2, sp=(m == "gpt2") == (s == "1f1b"), schedule=s)
        for m in ("gpt2", "modern")
        for s in ("1f1b", "dualpipev")
    ]
    + [dict(model=m, tp=2, zero=z, sp=True) for m in ("gpt2", "modern") for z in (1, 2, 3)]
    + [
        dict(model="gpt2", pp=4),
        dict(model="modern", pp=4, documents=True),
        dict(model="modern", tp=2, zero=3, sp=True, precision="bf16"),
    ],
    6: [
        dict(model="odd", tp=3, pp=2),
        dict(model="odd", tp=3, zero=3),
        dict(model="gpt1", tp=2, pp=3, sp=True),
        dict(model="mqa", pp=3, documents=True),
        dict(model="parallel", tp=2, sp=True, zero=2, batch_size=12),
    ],
    8: [
        dict(model="gpt2", tp=2, pp=2, micro_batch_size=1),
        dict(model="modern", tp=2, pp=2, sp=True),
        dict(model="gpt2", tp=2, pp=4, sp=True),
        dict(model="modern", tp=2, pp=4),
        dict(model="modern", tp=2, pp=2, schedule="dualpipev", sp=True),
        dict(model="gpt2", tp=2, pp=2, schedule="dualpipev", documents=True),
        dict(model="modern", tp=2, zero=3, sp=True),
    ],
}


@pytest.mark.parametrize("world_size", FAST)
def test_layouts_match_plain_torch(world_size: int) -> None:
    """The promise of the project, on the layouts that once broke it."""
    check(world_size, FAST[world_size])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", ALL)
def test_every_layout_matches_plain_torch(world_size: int) -> None:
    """The promise of the project, whole."""
    check(world_size, ALL[world_size], num_steps=STEPS if world_size == 1 else FEW_STEPS)


@pytest.mark.parametrize(
    "world_size, layouts",
    [
        (1, [dict()]),
        pytest.param(
            2, [dict(tp=2, sp=True), dict(pp=2), dict(tp=2, zero=3)], marks=pytest.mark.slow
        ),
    ],
)
def test_recompute_is_exact_with_dropout(world_size: int, layouts: list[Case]) -> None:
    """Recomputed blocks must draw the masks of the forward pass, also from megatron-core's tracked streams."""
    cases = [
        config("modern", dropout=0.2, recompute=r, micro_batch_size=4, **layout)
        for layout in layouts
        for r in ("none", "full", "selective")
    ]
    found = run_on_ranks(train_all, world_size, cases, [{}] * len(cases), FEW_STEPS)[0]
    histories = iter(run["history"] for run in found)
    for layout, stored, full, selective in zip(
        layouts, histories, histories, histories, strict=True
    ):
        assert stored == full == selective, layout


def with_groups(kind: str, **layout: Any) -> Any:
    """A run whose stages hold parameters of different groups: only the ends have embeddings."""
    cfg = config("gpt2-untied", **layout)
    if kind == "mup":
        model = replace(cfg.model, init=Init.mup, mup_base_hidden_size=32)
        return replace(cfg, model=model)
    given = (
        {"lr_scale": {"embedding.*": 0.5}} if kind == "lr_scale" else {"decay_embeddings": False}
    )
    return replace(cfg, optimizer=replace(cfg.optimizer, **given))


GROUPS: dict[int, list[tuple[str, Case]]] = {
    2: [("mup", dict(pp=2, schedule="dualpipev"))]
    + [(kind, dict(pp=2)) for kind in ("mup", "lr_scale", "decay_embeddings")],
    3: [(kind, dict(pp=3)) for kind in ("mup", "lr_scale", "decay_embeddings")]
    + [("lr_scale", dict(pp=3, precision="fp16"))],
    4: [(kind, dict(pp=2, tp=2)) for kind in ("mup", "lr_scale", "decay_embeddings")],
}


@pytest.mark.parametrize(
    "world_size", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))]
)
def test_stages_may_differ_in_parameter_groups(world_size: int) -> None:
    """A norm for each group hung in step 1: stages with fewer groups made fewer reductions."""
    cases = GROUPS[world_size]
    configs = [with_groups(kind, **layout) for kind, layout in cases]
    got = run_on_ranks(train_all, world_size, configs, [{}] * len(cases), FEW_STEPS)[0]
    alone = [with_groups(kind) for kind, _ in cases]
    expected = run_on_ranks(train_all, 1, alone, [{}] * len(cases), FEW_STEPS)[0]
    for (kind, layout), have, want in zip(cases, got, expected):
        compare(have, want["history"], layout.get("precision", "fp32"), f"{kind} {layout}")


@pytest.mark.parametrize(
    "sabotage",
    [
        "sequence_parallel_reduction",
        "gradient_scale",
        pytest.param("pipe_partitioned", marks=pytest.mark.slow),
    ],
)
def test_sabotage_turns_the_comparison_red(sabotage: str) -> None:
    """A suite that cannot fail proves nothing."""
    cfg = config("modern", tp=2, pp=2 if sabotage == "pipe_partitioned" else 1, sp=True)
    history = run_on_ranks(
        train_sabotaged, 4 if sabotage == "pipe_partitioned" else 2, cfg, sabotage
    )[0]["history"]
    with pytest.raises(AssertionError, match="differs"):
        compare({"history": history}, reference(cfg, num_steps=FEW_STEPS), "fp32", sabotage)


def train_sabotaged(cfg: Any, sabotage: str) -> dict[str, Any]:
    """A run with one part of the engine broken."""
    from pipeline.engine import engine

    if sabotage == "sequence_parallel_reduction":
        from pipeline.engine.deepspeed import base

        base.sum_at_once = lambda *_: None
    elif sabotage == "gradient_scale":
        whole = engine.Engine._token_weights
        engine.Engine._token_weights = lambda self, b: (
            [2.0 / b[0].labels.numel() * (x.labels >= 0) for x in b] if whole else []
        )
    else:
        from pipeline.engine.deepspeed import base

        written = base.deepspeed_config
        base.deepspeed_config = lambda *a: {k: v for k, v in written(*a).items() if k != "pipeline"}
    return train(cfg, batches()[:FEW_STEPS])
