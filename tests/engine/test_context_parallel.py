"""Ranks that share each sequence: the same losses and norms with every other axis, and the same answers and checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.huggingface.writer import DType
from tests.engine.test_engine import engine_of
from tests.support.checkpoint_runs import Run, resume, train_and_save
from tests.support.equivalence import Case, check, compare
from tests.support.exported import export_and_compare, tokenizer_file
from tests.support.layouts import (
    FEW_STEPS,
    batches,
    config,
    rank_batches,
    reference,
    reset_parallel_state,
    train,
    train_all,
)
from tests.support.ranks import run_on_ranks

LORA: Case = dict(train="*.lora_?", lora_rank=4)
CASES: dict[int, list[Case]] = {
    2: [
        dict(model="gpt2", cp=2, zero=0),
        dict(model="gpt2", cp=2, documents=True, positions=True),
        dict(model="modern", cp=2, zero=3, documents=True),
        dict(model="modern", cp=2, masked=True, recompute="full"),
        dict(model="modern", cp=2, train="layers.3.* head.*", recompute="selective"),
        dict(model="modern", cp=2, documents=True, masked=True, **LORA),
        dict(model="mqa", cp=2),
        dict(model="moe-aux", cp=2, micro_batch_size=4),
        dict(model="gpt2", cp=2, zero=2, offload=True),
        dict(model="modern", cp=2, precision="bf16"),
        dict(model="modern", cp=2, zero=3, precision="bf16"),
        dict(model="gpt2", cp=2, zero=2, precision="fp16"),
    ],
    4: [
        dict(model="modern", cp=4, zero=3, documents=True),
        dict(model="gpt2", cp=2, documents=True),
        dict(model="modern", cp=2, zero=3, masked=True),
        dict(model="modern", cp=2, tp=2, sp=True, documents=True),
        dict(model="gpt2", cp=2, tp=2, zero=3),
        dict(model="gpt2", cp=2, pp=2, masked=True),
        dict(model="modern", cp=2, pp=2, schedule="dualpipev", documents=True),
        dict(model="modern", cp=2, pp=2, precision="bf16"),
        dict(model="moe-aux", cp=2, tp=2, sp=True),
    ],
    6: [dict(model="odd", cp=2, tp=3)],
    8: [
        dict(model="modern", cp=2, tp=2, pp=2, sp=True, documents=True),
        dict(model="gpt2", cp=4, pp=2, schedule="dualpipev"),
        dict(model="modern", cp=2, tp=2, sp=True, zero=3, documents=True),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", CASES)
def test_ranks_that_share_sequences_match_plain_torch(world_size: int) -> None:
    """With every other axis, documents, masks, fewer key heads than ranks, router losses, and what is frozen.

    moe-aux sees a wrong scale of the router losses in the norm alone: the loss of the first step is right.
    """
    check(world_size, CASES[world_size])


def train_sabotaged(cfg: Any, sabotage: str) -> dict[str, Any]:
    """A run with one part of context parallelism broken."""
    from pipeline.engine import engine
    from pipeline.model import architecture, context_parallel

    if sabotage == "router scale":
        whole = engine.set_moe_loss_scale
        engine.set_moe_loss_scale = lambda scale, **_: whole(scale, context_ranks=1)
    elif sabotage == "backward exchange":
        exchange = context_parallel._all_to_all

        def unswapped(ctx: Any, grad: torch.Tensor) -> Any:
            """Runs stay with their ranks: of the right shape, and of other tokens."""
            back = exchange(grad, ctx.group, gather=ctx.split, split=ctx.gather)
            dims = (ctx.split, ctx.gather)
            return back.transpose(*dims).flip(0).transpose(*dims), None, None, None

        context_parallel._Exchange.backward = staticmethod(unswapped)
    else:  # every rank counts the positions of its own run
        tables = architecture.rope_table

        def of_a_run(model: Any) -> Any:
            table = tables(model)
            whole = table.tables
            table.tables = lambda size, *args, **kwargs: tuple(
                torch.cat([part.narrow(d, 0, size // 2)] * 2, dim=d)
                for d in [0 if kwargs["sequence_first"] else 1]
                for part in whole(size, *args, **kwargs)
            )
            return table

        architecture.rope_table = of_a_run
    return train(cfg, batches()[:FEW_STEPS])


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", ["router scale", "backward exchange", "rope length"])
def test_sabotage_turns_the_comparison_red(sabotage: str) -> None:
    """A suite that cannot fail proves nothing."""
    cfg = config("moe-aux" if sabotage == "router scale" else "modern", cp=2)
    history = run_on_ranks(train_sabotaged, 2, cfg, sabotage)[0]["history"]
    with pytest.raises(AssertionError, match="differs"):
        compare({"history": history}, reference(cfg, num_steps=FEW_STEPS), "fp32", sabotage)


@pytest.mark.slow
def test_dropout_is_each_copys_own_and_repeats() -> None:
    """The masks are those of a layout: the same again, and when they are recomputed; with documents by blocks."""
    cases = [
        config("modern", cp=2, dropout=0.2, recompute=r, documents=documents)
        for documents in (False, True)
        for r in ("none", "full", "selective")
    ]
    kinds = [{"documents": documents} for documents in (False, True) for _ in range(3)]
    found = [run["history"] for run in run_on_ranks(train_all, 2, cases, kinds, FEW_STEPS)[0]]
    assert found[0] == found[1] == found[2] and found[3] == found[4] == found[5]
    without = reference(config("modern"), num_steps=1)
    assert found[0][0][0] == pytest.approx(without[0][0], rel=0.1)
    assert found[0][0][0] != pytest.approx(without[0][0], rel=1e-4)


def answers(cases: list[Case]) -> list[Any]:
    """Scores of a model that was trained a little, whose answers may lie on two ranks; and hidden states of it."""
    from pipeline.engine.forward_only import ForwardOnly
    from pipeline.model.stage_io import StageSchema

    found = []
    for case in cases:
        cfg = config("modern", documents=True, **case)
        engine = engine_of(cfg)
        steps = batches(documents=True)
        for step in steps:
            step["labels"] = torch.where(step["labels"] % 10 < 7, 7, step["labels"])
            step["mask"] = (torch.arange(32) % 6 < 3).float().expand_as(step["labels"])
        parts = [rank_batches(step, engine.shape, engine.layout) for step in steps]
        for number in range(6):
            engine.train_step(parts[number], step=number)
        scores = [float(x) for x in vars(engine.evaluate(parts[7], answers=True)).values()]
        asked = ForwardOnly(
            engine.architecture, StageSchema.of(cfg.data, cfg.parallel, cfg.model), engine.layout,
            seq_len=engine.shape.seq_len, seed=cfg.seed,
        )  # fmt: skip
        fresh = [float(x) for x in vars(asked.evaluate(parts[0], answers=True)).values()]
        hidden = [
            (tuple(h.shape), float(h.abs().sum()))
            for h in asked.hidden_states(parts[0][:1], layer=1)
        ]
        found.append((scores, fresh, hidden))
        reset_parallel_state()
    return found


@pytest.mark.slow
def test_answers_that_lie_on_two_ranks_are_counted_once() -> None:
    """Every rank has half of each row; tokens 12 to 14 and 18 to 20 are answers, and so are 15 and 16's neighbours."""
    assert (torch.arange(32) % 6 < 3)[[13, 18, 19, 20]].tolist() == [True] * 4
    [[(scores, fresh, hidden)]] = run_on_ranks(answers, 1, [{}])
    assert 0.1 * scores[3] < scores[2] < 0.9 * scores[3]
    for layouts in ([dict(cp=2)], [dict(cp=2, pp=2), dict(cp=2, tp=2, sp=True), dict(cp=4)]):
        size = 2 if len(layouts) == 1 else 4
        for ranks in run_on_ranks(answers, size, layouts):
            for case, (have, have_fresh, have_hidden) in zip(layouts, ranks):
                assert have[1:] == scores[1:] and have_fresh[1:] == fresh[1:], case
                assert have[0] == pytest.approx(scores[0], rel=1e-5), case
                for shape, total in have_hidden:
                    assert shape == hidden[0][0] and total == pytest.approx(hidden[0][1], rel=1e-4)


def saved_by_two(folder: Path, tokenizer: Path) -> list[Any]:
    """Three steps at CP2, kept for export; then to the fifth, and the same from the checkpoint at ZeRO-3."""
    history = train_and_save(
        config("modern", cp=2),
        folder,
        [3],
        5,
        attachments={"tokenizer.json": tokenizer.read_bytes()},
    )
    return [history[3:], resume(config("modern", cp=2, zero=3), folder, 5)]


def resumed_by_one(folder: Path) -> Any:
    return resume(config("modern"), folder, 5, save_to=folder / "one")


def back_at_four(folder: Path) -> Any:
    found = [
        resume(config("modern", **layout), folder / "one", 5)
        for layout in (dict(cp=2, tp=2, sp=True), dict(cp=2, pp=2), dict(cp=2))
    ]
    run = Run(config("modern", cp=4), folder / "one")  # the files name the layout that wrote them
    assert run.checkpointer.restore(run.engine).layout["context_parallel_size"] == 1
    run.close()
    return found


@pytest.mark.slow
def test_a_checkpoint_moves_to_one_process_and_back_and_is_exported(tmp_path: Path) -> None:
    """Weights, moments and step are the same bits; afterwards fp32 rounding."""
    tokenizer = tokenizer_file(tmp_path)
    root = tmp_path / "checkpoints"
    expected, zero3 = run_on_ranks(saved_by_two, 2, root / "modern", tokenizer)[0]
    one = run_on_ranks(resumed_by_one, 1, root / "modern")[0]
    others = run_on_ranks(back_at_four, 4, root / "modern")[0]
    for history in (zero3, one, *others):
        assert history[0][0] == pytest.approx(expected[0][0], rel=2e-7)
        for got, want in zip(history, expected, strict=True):
            assert got == pytest.approx(want, rel=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        differences = run_on_ranks(
            export_and_compare, 1, ["modern"], root, tmp_path / "exported", DType.fp32
        )[0]
    assert differences["modern"] < 1e-4
