"""A private step's gradient: each sequence's by itself in plain torch, clipped, summed, and the same noise at every layout."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

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

KEY = "secret"
STEP = 3
Case = dict[str, Any]
CASES: dict[int, list[Case]] = {
    1: [
        dict(model="gpt2", zero=0, micro_batch_size=4),
        dict(model="modern", zero=2, micro_batch_size=1),
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
        noise = secret_normal(name, Partition.of(total.shape), key=KEY, purpose=f"salt/{STEP}")
        scale = dp.noise_multiplier * dp.clip_norm if with_noise else 0.0
        found[name] = (total + scale * noise) / BATCH
    return found


def step_on_ranks(cases: list[PretrainConfig]) -> list[dict[str, Any]]:
    """Loss, norm before the noise, and [(name, partition, first element, gradient)] as the optimizer is given it."""
    return [step_with(cfg) for cfg in cases]


def step_with(cfg: PretrainConfig) -> dict[str, Any]:
    """One layout of step_on_ranks."""
    from pipeline.engine.engine import Engine
    from pipeline.training.build import _parts, _sections

    ranks = ranks_from_environment()
    shape = derive(cfg, world_size=ranks.world_size, tokenizer_vocab_size=VOCAB)
    layout = connect(ranks, shape.sizes)
    engine = Engine(*_parts(cfg, shape, layout), **_sections(cfg, shape), noise_key=KEY)
    assert engine.private is not None
    engine.private.salt = "salt"
    named = {id(p): (name, part) for name, (p, part) in engine.all_parameters().items()}
    given: list[Any] = []

    def keep(optimizer: Any, *_: Any) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for slot in engine.runner.slots():
            if id(slot.flat) in held:
                run = slot.flat.grad.view(-1)[slot.offset : slot.offset + slot.numel]
                given.append((*named[id(slot.parameter)], slot.start, run.clone().numpy()))

    engine.runner.optimizer.register_step_pre_hook(keep)
    mine = [_batch(one) for one in rank_batches(whole_batch(), shape, layout)]
    result = engine.train_step(mine, step=STEP)
    reset_parallel_state()
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
        seen: dict[str, int] = dict.fromkeys(want, 0)
        for rank in ranks:
            got = rank[number]
            assert got["loss"] == pytest.approx(loss, rel=1e-5), case
            assert got["norm"] == pytest.approx(norm, rel=1e-5), case
            for name, part, start, values in got["given"]:
                local = torch.zeros(part.local_shape)
                for target, source in part.pieces():
                    local[target] = want[name][source]
                run = local.flatten()[start : start + len(values)].numpy()
                np.testing.assert_allclose(values, run, rtol=1e-4, atol=1e-6, err_msg=f"{case} {name}")  # fmt: skip
                seen[name] += len(values)
        assert all(count >= want[name].numel() for name, count in seen.items()), case


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_gradient_is_the_per_sequence_loop_s_with_the_noise_of_name_and_step(
    world_size: int,
) -> None:
    check(world_size, CASES[world_size])


@pytest.mark.slow
def test_the_gradient_is_the_per_sequence_loop_s_at_four_ranks() -> None:
    check(4, CASES[4])
