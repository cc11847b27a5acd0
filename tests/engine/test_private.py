"""A private step's gradient: each sequence's by itself in plain torch, clipped, summed, and the same noise at every layout.

fp32: relative 1e-4 of each element. bf16, whose forward and backward passes round to 8 bits: within 3e-2 of the norm of the
fp32 gradient, and 5e-3 of its loss, as in test_equivalence; a wrong sum (a factor, a missing rank) is an error of tenths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.choices import Precision
from pipeline.config.finetune import PrivacyConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import derive
from pipeline.data.batch import Batch
from pipeline.distributed.layout import connect
from pipeline.distributed.ranks import ranks_from_environment
from pipeline.engine.secret_noise import secret_normal
from pipeline.model.partition import Partition
from tests.support.layouts import BATCH, VOCAB, batches, config, rank_batches, reset_parallel_state
from tests.support.ranks import run_on_ranks
from tests.support.reference import ReferenceGPT

KEY, SALT = "secret", "salt"
STEP = 3
Case = dict[str, Any]
CASES: dict[int, list[Case]] = {
    1: [
        dict(model="gpt2", zero=0, micro_batch_size=4),
        dict(model="modern", zero=2, micro_batch_size=1, recompute="full"),
        dict(model="gpt2", train="*.lora_?", lora_rank=4),
    ],
    2: [
        dict(model="modern", tp=2, sp=True, zero=1),
        dict(model="gpt2", zero=2, micro_batch_size=4),
        dict(model="modern", tp=2, zero=0),
    ],
    4: [
        dict(model="modern", tp=2, sp=True, zero=2),
        dict(model="gpt2", zero=1, micro_batch_size=1),
        dict(model="modern", tp=2, zero=1, train="*.lora_?", lora_rank=4),
    ],
}
BF16: dict[int, list[Case]] = {
    1: [
        dict(model="gpt2", zero=1, micro_batch_size=4, precision="bf16"),
        dict(model="modern", zero=2, precision="bf16", train="*.lora_?", lora_rank=4),
    ],
    2: [
        dict(model="modern", tp=2, sp=True, zero=1, precision="bf16"),
        dict(model="gpt2", zero=2, precision="bf16"),
    ],
}


def private(case: Case, clip_norm: float) -> PretrainConfig:
    cfg = config(**case, clip_grad=0.0)
    dp = PrivacyConfig(clip_norm=clip_norm, noise_multiplier=0.5)
    return replace(cfg, finetune=replace(cfg.finetune, dp=dp))


def whole_batch() -> dict[str, Tensor]:
    """A global batch whose sequences have different numbers of tokens that count."""
    return batches(masked=True)[STEP]


def sequence_gradients(cfg: PretrainConfig) -> tuple[list[dict[str, Tensor]], float]:
    """Gradient of each sequence's mean loss, one by one in plain torch; the mean of the losses."""
    shape = derive(config(), world_size=1, tokenizer_vocab_size=VOCAB)
    model, step = ReferenceGPT(cfg, shape.vocab_size), whole_batch()
    trained = {n: w for n, w in model.weights.items() if w.requires_grad}
    gradients, losses = [], []
    for i in range(BATCH):
        row = slice(i, i + 1)
        mask = step["mask"][row]
        loss = model.loss(step["tokens"][row], step["labels"][row], mask=mask)
        gradients.append(dict(zip(trained, torch.autograd.grad(loss, list(trained.values())))))
        losses.append(float(loss.detach()))
    return gradients, sum(losses) / BATCH


def norms(gradients: list[dict[str, Tensor]]) -> list[float]:
    return [float(torch.stack([g.square().sum() for g in one.values()]).sum().sqrt()) for one in gradients]  # fmt: skip


def expected(
    gradients: list[dict[str, Tensor]], dp: PrivacyConfig, *, with_noise: bool
) -> dict[str, Tensor]:
    """(sum_i min(1, C / |g_i|) g_i + sigma C noise) / B."""
    assert dp.clip_norm is not None
    factors = [min(1.0, dp.clip_norm / norm) for norm in norms(gradients)]
    assert sum(f < 1 for f in factors) > 3 and sum(f == 1 for f in factors) > 3
    found = {}
    for name in gradients[0]:
        total = torch.stack([f * g[name] for f, g in zip(factors, gradients)]).sum(0)
        part = Partition.of(total.shape)
        noise = secret_normal(name, part, key=KEY, purpose=f"{SALT}/{STEP}")
        scale = dp.noise_multiplier * dp.clip_norm if with_noise else 0.0
        found[name] = (total + scale * noise) / BATCH
    return found


def step_on_ranks(cases: list[PretrainConfig]) -> list[dict[str, Any]]:
    """Loss, norm before the noise, and [(name, partition, first element, gradient)] as the optimizer is given it."""
    return [step_with(cfg, whole_batch()) for cfg in cases]


def step_with(
    cfg: PretrainConfig, batch: dict[str, Tensor], *, broken_token: int | None = None
) -> dict[str, Any]:
    """One layout of step_on_ranks; broken_token: one whose row of the embedding is infinite."""
    from pipeline.engine.engine import Engine
    from pipeline.training.build import _parts, _sections

    ranks = ranks_from_environment()
    shape = derive(cfg, world_size=ranks.world_size, tokenizer_vocab_size=VOCAB)
    layout = connect(ranks, shape.sizes)
    engine = Engine(*_parts(cfg, shape, layout), **_sections(cfg, shape), noise_key=KEY)
    assert engine.private is not None
    engine.private.salt = SALT
    if broken_token is not None:
        engine.all_parameters()["embedding.word.weight"][0].data[broken_token] = torch.inf
    named = {id(p): (name, part) for name, (p, part) in engine.all_parameters().items()}
    given: list[Any] = []

    def keep(optimizer: Any, *_: Any) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for slot in engine.runner.slots():
            if id(slot.flat) in held:
                run = slot.flat.grad.view(-1)[slot.offset : slot.offset + slot.numel]
                given.append((*named[id(slot.parameter)], slot.start, run.clone().numpy()))

    engine.runner.optimizer.register_step_pre_hook(keep)
    mine = [_batch(one) for one in rank_batches(batch, shape, layout)]
    result = engine.train_step(mine, step=STEP)
    reset_parallel_state()
    assert not result.skipped
    return {"loss": float(result.loss), "norm": float(result.grad_norm), "given": given}


def _batch(one: Any) -> Batch:
    known = {f.name: getattr(one, f.name, None) for f in fields(Batch)}
    return Batch(**known | {"sample_ids": np.zeros(len(one.tokens), np.int64)})


def check(world_size: int, cases: list[Case]) -> None:
    """All cases of one world size in one set of processes."""
    found, configs = {}, []
    for case in cases:
        key = (case["model"], case.get("lora_rank", 0))
        gradients, loss = found.setdefault(key, sequence_gradients(private(case, 1.0)))
        configs.append(private(case, float(np.median(norms(gradients)))))
    ranks = run_on_ranks(step_on_ranks, world_size, configs)
    for number, (case, cfg) in enumerate(zip(cases, configs)):
        gradients, loss = found[case["model"], case.get("lora_rank", 0)]
        want = expected(gradients, cfg.finetune.dp, with_noise=True)
        quiet = expected(gradients, cfg.finetune.dp, with_noise=False)
        norm = norms([quiet])[0]
        is_bf16 = cfg.training.precision is Precision.bf16
        seen: dict[str, int] = dict.fromkeys(want, 0)
        for rank in ranks:
            got = rank[number]
            assert got["loss"] == pytest.approx(loss, rel=5e-3 if is_bf16 else 1e-5), case
            assert got["norm"] == pytest.approx(norm, rel=3e-2 if is_bf16 else 1e-5), case
            error = 0.0
            for name, values, run in runs_of(got, want):
                if is_bf16:
                    error += float(np.square(values - run).sum())
                else:
                    np.testing.assert_allclose(values, run, rtol=1e-4, atol=1e-6, err_msg=f"{case} {name}")  # fmt: skip
                seen[name] += len(values)
            assert error**0.5 < 3e-2 * norm, case
        assert all(count >= want[name].numel() for name, count in seen.items()), case


def runs_of(
    got: dict[str, Any], want: dict[str, Tensor]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, what the optimizer was given of a run of a parameter, what it should have been)."""
    for name, part, start, values in got["given"]:
        local = torch.zeros(part.local_shape)
        for target, source in part.pieces():
            local[target] = want[name][source]
        yield name, values, local.flatten()[start : start + len(values)].numpy()


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_gradient_is_the_per_sequence_loop_s_with_the_noise_of_name_and_step(
    world_size: int,
) -> None:
    check(world_size, CASES[world_size])


@pytest.mark.slow
def test_the_gradient_is_the_per_sequence_loop_s_at_four_ranks() -> None:
    check(4, CASES[4])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_gradient_in_bf16_is_the_fp32_loop_s_as_far_as_bf16_rounds(world_size: int) -> None:
    check(world_size, BF16[world_size])


def without(row: int) -> dict[str, Tensor]:
    """The whole batch, none of whose tokens of a sequence count."""
    batch = whole_batch()
    batch["mask"][row] = 0
    return batch


def steps_without(cfgs: list[PretrainConfig], row: int) -> list[float]:
    """How far each step's sum of clipped gradients moves without a sequence; its noise is the same."""
    found = []
    for cfg in cfgs:
        pair = [step_with(cfg, batch)["given"] for batch in (whole_batch(), without(row))]
        moved = sum(float(np.square(a[3] - b[3]).sum()) for a, b in zip(*pair, strict=True))
        found.append(BATCH * moved**0.5)
    return found


def step_beside(cfg: PretrainConfig, broken_token: int) -> dict[str, Any]:
    return step_with(cfg, whole_batch(), broken_token=broken_token)


@pytest.mark.slow
def test_a_sequence_moves_the_sum_by_no_more_than_the_clipping_norm() -> None:
    """What epsilon rests on, in fp32 exactly and in bf16 to its rounding, which another sequence's share may feel too."""
    gradients, _ = sequence_gradients(private(dict(model="gpt2"), 1.0))
    sizes = norms(gradients)
    clip_norm, row = float(np.median(sizes)), int(np.argmax(sizes))
    cases = [dict(model="gpt2", precision=p, micro_batch_size=4) for p in ("fp32", "bf16")]
    (moved,) = run_on_ranks(steps_without, 1, [private(case, clip_norm) for case in cases], row)
    assert moved[0] == pytest.approx(clip_norm, rel=1e-4)
    assert moved[1] == pytest.approx(clip_norm, rel=2e-2)


@pytest.mark.slow
def test_a_sequence_without_a_finite_gradient_does_not_stop_the_step() -> None:
    """The step was left out, which tells of the sequence without any noise; now the sequence is left out of the step."""
    case = dict(model="modern", zero=0, micro_batch_size=4)
    tokens = whole_batch()["tokens"]
    counts = (tokens[..., None] == torch.arange(VOCAB)).any(1).sum(0)
    token = int((counts == 2).nonzero()[0])
    bad = (tokens == token).any(1)
    cfg = private(case, 1.0)
    gradients, _ = sequence_gradients(cfg)
    cfg = private(case, float(np.median(norms(gradients))))
    want = expected([g for g, b in zip(gradients, bad) if not b], cfg.finetune.dp, with_noise=True)
    (got,) = run_on_ranks(step_beside, 1, cfg, token)
    for name, values, run in runs_of(got, want):
        np.testing.assert_allclose(values, run, rtol=1e-4, atol=1e-6, err_msg=name)
