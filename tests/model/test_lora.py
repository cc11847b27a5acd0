"""Low-rank matrices and frozen weights: one result at every layout, and nothing frozen moves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.config.finetune import FinetuneConfig
from pipeline.config.run_shape import derive
from pipeline.errors import ConfigError
from tests.support.equivalence import Case, check, compare
from tests.support.layouts import FEW_STEPS, VOCAB, batches, config, reference, train
from tests.support.ranks import run_on_ranks

LORA: Case = dict(train="*.lora_?", lora_rank=4)
NORMS: Case = dict(train="*.lora_? *norm.*", lora_rank=4)
LAST: Case = dict(train="layers.2.* layers.3.* final_norm.* head.*")
FAST: dict[int, list[Case]] = {
    1: [
        dict(model="gpt2", **LORA),
        dict(model="modern", zero=3, precision="bf16", **LORA),
        dict(model="modern", masked=True, **LAST),
    ],
    2: [
        dict(model="modern", tp=2, sp=True, masked=True, **NORMS),
        dict(model="gpt2", tp=2, zero=3, **LORA),
        dict(model="gpt2", pp=2, **LORA),
        dict(model="gpt2", pp=2, precision="bf16", **LORA),  # its tied weight is frozen
        dict(model="modern", zero=2, **LAST),
        dict(model="gpt2", tp=2, train="*.bias *.position.*"),
    ],
}
ALL: dict[int, list[Case]] = {
    1: [
        dict(model=m, zero=z, **kind)
        for m, kind in (("gpt2", LORA), ("modern", NORMS), ("modern", LAST))
        for z in (0, 1, 2, 3)
    ]
    + [dict(model="gpt2", zero=z, precision=p, **LORA) for z in (1, 2, 3) for p in ("bf16", "fp16")]
    + [
        dict(model="gpt2", zero=2, offload=True, **LORA),
        dict(model="gpt2", recompute="full", **LORA),
        dict(model="modern", recompute="selective", **LAST),
        dict(model="gpt2", train="head.* final_norm.*") | dict(model="modern"),
        dict(model="moe", **LORA),
    ],
    # Every pair of what is trained, ZeRO stage and sequence parallelism, and of model, schedule and precision.
    2: [
        dict(model=m, tp=2, zero=z, sp=(number + z // 2) % 2 == 1, **kind)
        for number, (m, kind) in enumerate((("gpt2", LORA), ("modern", NORMS), ("modern", LAST)))
        for z in (0, 2, 3)
    ]
    + [dict(model=m, zero=z, **LORA) for m in ("gpt2", "modern") for z in (0, 1, 2, 3)]
    + [
        dict(
            model=m,
            pp=2,
            schedule=s,
            precision=("fp32", "bf16")[(number + (s == "1f1b")) % 2],
            **LORA,
        )
        for number, m in enumerate(("gpt2", "modern", "gpt2-untied"))
        for s in ("1f1b", "dualpipev")
    ]
    + [
        dict(model="gpt2", pp=2, precision="fp16", **LORA),
        dict(model="modern", tp=2, sp=True, recompute="full", **LORA),
        dict(model="modern", tp=2, zero=1, sp=True, precision="bf16", **LORA),
        dict(model="gpt2", tp=2, sp=True, train="*.bias"),
        dict(model="moe", tp=2, sp=True, **LORA),
    ],
    4: [
        dict(model=m, tp=2, pp=2, sp=True, schedule=s, **kind)
        for m, kind in (("gpt2", LORA), ("modern", NORMS))
        for s in ("1f1b", "dualpipev")
    ]
    + [dict(model="modern", tp=2, zero=z, sp=True, **LORA) for z in (1, 2, 3)]
    + [dict(model="modern", pp=2, documents=True, **LORA)],
}


@pytest.mark.parametrize("world_size", FAST)
def test_what_is_trained_gives_one_result_at_every_layout(world_size: int) -> None:
    """Against plain torch. A whole matrix times a split one is where others went wrong."""
    check(world_size, FAST[world_size])


def check_gradients() -> None:
    """_PlusWide beside the sum that it is, in double precision."""
    from pipeline.model.lora import _PlusWide

    generator = torch.Generator().manual_seed(0)
    out, narrow, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 5), (2, 3, 4), (5, 4))
    )
    torch.testing.assert_close(_PlusWide.apply(out, narrow, b), out + narrow @ b.t())
    assert torch.autograd.gradcheck(_PlusWide.apply, (out, narrow, b))
    gradients = torch.autograd.grad(_PlusWide.apply(out, narrow, b).sum(), (narrow, b))
    assert all(gradient.is_contiguous() for gradient in gradients)
    [frozen] = torch.autograd.grad(_PlusWide.apply(out, narrow, b.detach()).sum(), narrow)
    torch.testing.assert_close(frozen, gradients[0])


def test_gradients_of_the_low_rank_sum_are_right_and_can_be_reduced() -> None:
    """megatron-core all-reduces a copy of a gradient that is not contiguous, and drops it."""
    run_on_ranks(check_gradients, 1)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", ALL)
def test_every_layout_matches_plain_torch(world_size: int) -> None:
    """TP, SP, PP, DualPipeV, ZeRO 0 to 3, offload, recompute, bf16, fp16, experts beside."""
    check(world_size, ALL[world_size])


@pytest.mark.parametrize("fault", ["drawn by shard", "no partial gradient"])
def test_a_planted_fault_turns_the_comparison_red(fault: str) -> None:
    """Megatron-Bridge issue 5840 drew A per shard: converged losses grew with TP, without an error."""
    cfg = config("modern", tp=2, sp=True, **LORA)
    history = run_on_ranks(train_with, 2, cfg, fault)[0]["history"]
    with pytest.raises(AssertionError, match="differs"):
        compare({"history": history}, reference(cfg, num_steps=FEW_STEPS), "fp32", fault)


def train_with(cfg: Any, fault: str) -> dict[str, Any]:
    """A run with one of two mistakes others made."""
    from pipeline.engine import engine
    from pipeline.model.lora import LowRank
    from pipeline.model.partition import Partition

    if fault == "drawn by shard":
        right = engine.initialize

        def by_shard(parameter: Any, name: str, part: Partition, **kwargs: Any) -> None:
            own = Partition.of(tuple(parameter.shape)) if name.endswith("lora_a") else part
            right(parameter, name, own, **kwargs)

        engine.initialize = by_shard
    else:
        add = LowRank.add_low_rank

        def unmarked(self: Any, **kwargs: Any) -> None:
            add(self, **kwargs)
            for matrix in (self.lora_a, self.lora_b):
                vars(matrix)["has_partial_gradient"] = False

        LowRank.add_low_rank = unmarked  # type: ignore[method-assign]
    return train(cfg, batches()[:FEW_STEPS])


def frozen_and_trained(cfg: Any) -> tuple[bool, bool, int, set[str]]:
    """(nothing frozen moved, all trained moved, elements of optimizer state, names with gradients)."""
    from pipeline.distributed.layout import connect
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.engine import state
    from pipeline.training.build import build_engine
    from tests.support.layouts import rank_batches, reset_parallel_state

    ranks = ranks_from_environment()
    shape = derive(cfg, world_size=ranks.world_size, tokenizer_vocab_size=VOCAB)
    layout = connect(ranks, shape.sizes)
    engine = build_engine(cfg, shape, layout)

    def copies(fragments: Any) -> dict[tuple[str, int], torch.Tensor]:
        return {(f.name, f.start): f.views["weight"].clone() for f in fragments}

    frozen, trained = copies(state.frozen_fragments(engine)), copies(state.fragments(engine))
    for number, step in enumerate(batches()[:3]):
        engine.train_step(rank_batches(step, shape, layout), step=number)
    after = copies(engine.fragments())
    assert after.keys() == frozen.keys() | trained.keys()
    still = all(torch.equal(before, after[key]) for key, before in frozen.items())
    moved = all(not torch.equal(before, after[key]) for key, before in trained.items())
    size = sum(
        value.numel()
        for entry in engine.runner.optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor) and value.dim()
    )
    graded = {name for name, (p, _) in engine.all_parameters().items() if p.grad is not None}
    reset_parallel_state()
    return still, moved, size, graded


def measure(configs: list[Any]) -> list[tuple[bool, bool, int, set[str]]]:
    return [frozen_and_trained(cfg) for cfg in configs]


def test_frozen_weights_stay_bitwise_and_cost_no_optimizer_state() -> None:
    """At every ZeRO stage, in fp32 and bf16, and in a pipeline; with no gradient left behind."""
    layouts = [dict(zero=z) for z in (0, 1, 2, 3)] + [dict(pp=2), dict(zero=3, precision="bf16")]
    configs = [config("gpt2", **LORA, **layout) for layout in layouts]
    results = run_on_ranks(measure, 2, configs)
    # rank * (in + out) of qkv, proj, fc1, fc2 of four blocks, two moments
    numbers = 2 * 4 * 4 * ((64 + 192) + (64 + 64) + (64 + 256) + (256 + 64))
    for layout, *ranks in zip(layouts, *results):
        assert all(still and moved for still, moved, _, _ in ranks), layout
        assert all(".lora_" in name for *_, graded in ranks for name in graded), layout
        copies = 2 if layout.get("zero") == 0 else 1
        total = sum(size for _, _, size, _ in ranks)
        assert copies * numbers <= total < 1.01 * copies * numbers + 64, (layout, total)


def head_products(kinds: list[Case]) -> list[tuple[float, float]]:
    """Products of the head in (a forward pass, a step of training), of what each kind trains.

    Two vocabularies apart by 256 differ in the head alone, by 2 x tokens x width x 256 a product.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from pipeline.distributed.layout import connect
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.training.build import build_engine
    from tests.support.layouts import BATCH, SEQ_LEN, rank_batches, reset_parallel_state

    found = []
    for kind in kinds:
        counted = []
        for vocab_size in (256, 512):
            cfg = config("modern", **kind)
            cfg.model.vocab_size = vocab_size
            ranks = ranks_from_environment()
            shape = derive(cfg, world_size=1, tokenizer_vocab_size=vocab_size)
            layout = connect(ranks, shape.sizes)
            engine = build_engine(cfg, shape, layout)
            mine = rank_batches(batches()[0], shape, layout)
            with FlopCounterMode(display=False) as forward:
                engine.evaluate(mine)
            with FlopCounterMode(display=False) as step:
                engine.train_step(mine, step=0)
            counted.append([forward.get_total_flops(), step.get_total_flops()])
            reset_parallel_state()
        product = 2 * BATCH * SEQ_LEN * cfg.model.hidden_size * 256
        found.append(tuple((b - a) / product for a, b in zip(*counted)))
    return found


def test_a_frozen_head_costs_no_product_for_its_gradient() -> None:
    """Of the three products of a trained one, the logits' and the one with the hidden states' gradient."""
    assert run_on_ranks(head_products, 1, [LORA, {}])[0] == [(1, 2), (1, 3)]


def refused(message: str, model: str = "modern", world_size: int = 1, **settings: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        derive(config(model, **settings), world_size=world_size, tokenizer_vocab_size=VOCAB)


def test_patterns_that_name_nothing_are_refused_with_the_nearest_one() -> None:
    """A misspelt pattern would otherwise train less than was asked for."""
    refused(r"finetune.train: layers.7.\* names no parameter", train="layers.7.*")
    refused(r"Did you mean final_norm", train="final_nrm.*")
    refused(r"Low-rank matrices come with finetune=lora", train="*.lora_?")
    refused(r"layers.-5.\* names no parameter", train="layers.-5.*")
    refused(r"leaves frozen at a product of 0", train="head.*", lora_rank=4)


def test_linears_of_experts_get_no_low_rank_matrices() -> None:
    """Megatron-Bridge issue 5634: wrong numbers, and no error."""
    cfg = config("moe", **LORA)
    for targets in (["*.linear_fc1"], ["*.mlp.linear_*"], ["*"]):
        finetune = replace(cfg.finetune, lora_targets=targets)
        with pytest.raises(ConfigError, match="of a mixture of experts may name its attention"):
            derive(replace(cfg, finetune=finetune), world_size=1, tokenizer_vocab_size=VOCAB)


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_a_stage_that_trains_nothing_is_refused(schedule: str) -> None:
    """That stage's optimizer would raise, and the others wait for it for ever."""
    given = dict(pp=2, schedule=schedule, world_size=2, train="layers.-1.* layers.-2.* head.*")
    refused("names nothing on stage 0.* Set parallel.pipeline_parallel_size=1", **given)
    for settings in (LORA, dict(train="*norm.*")):
        cfg = config("modern", pp=2, schedule=schedule, **settings)
        derive(cfg, world_size=2, tokenizer_vocab_size=VOCAB)


def test_the_last_blocks_are_counted_from_the_end() -> None:
    """conf/finetune/last-layers.yaml serves models of every depth."""
    from pipeline.config.parameter_names import parameter_names, trained_names

    cfg = config("modern", train="layers.-1.* head.*")
    names = parameter_names(cfg.model, FinetuneConfig())
    found = set(trained_names(names, cfg.model, cfg.finetune))
    assert found == {n for n in names if n.startswith(("layers.3.", "head."))} and len(found) == 9
