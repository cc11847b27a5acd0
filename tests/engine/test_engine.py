"""What the engine promises beyond equal results: DeepSpeed gets our settings, fp16 scales, offload steps, NaN is skipped."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.nn.attention import SDPBackend

from pipeline.config.run_shape import derive
from tests.support.layouts import (
    VOCAB,
    allow_fp16_on_the_cpu,
    batches,
    config,
    rank_batches,
    reference,
    reset_parallel_state,
    train_all,
)
from tests.support.ranks import run_on_ranks
from tests.support.reference import ReferenceGPT


def engine_of(cfg: Any) -> Any:
    from pipeline.config.run_shape import derive
    from pipeline.distributed.layout import connect
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.training.build import build_engine

    ranks = ranks_from_environment()
    shape = derive(cfg, world_size=ranks.world_size, tokenizer_vocab_size=VOCAB)
    return build_engine(cfg, shape, connect(ranks, shape.sizes))


def deepspeed_facts(cfg: Any) -> dict[str, Any]:
    engine = engine_of(cfg).runner.deepspeed
    return {
        "stage": engine.zero_optimization_stage(),
        "clipping": engine.gradient_clipping(),
        "throughput_timer": engine.tput_timer.config.enabled,
        "micro_batches": engine.gradient_accumulation_steps(),
        "accumulation": str(engine.get_data_types()[1]),
        "pipe_partitioned": engine._config.pipeline["pipe_partitioned"],
        "grad_partitioned": engine._config.pipeline["grad_partitioned"],
        "bf16": engine.bfloat16_enabled(),
        "fused": all(group["fused"] for group in engine.optimizer.param_groups),
        "attention": [SDPBackend(kernel).name for kernel in torch._C._get_sdp_priority_order()][:4],
    }


def test_the_settings_we_rely_on_arrive_in_deepspeed() -> None:
    """Its defaults have changed between releases, and two of them corrupt results."""
    facts = run_on_ranks(deepspeed_facts, 2, config("gpt2", pp=2, precision="bf16", clip_grad=0.7))[
        0
    ]
    assert facts == {
        "stage": 1, "clipping": 0.0, "throughput_timer": False, "micro_batches": 8, "accumulation": "torch.float32",
        "pipe_partitioned": False, "grad_partitioned": False, "bf16": True, "fused": True,
        "attention": ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"],
    }  # fmt: skip


def compiled_at_start_up() -> Any:
    from pipeline.engine.deepspeed import environment  # noqa: F401

    # isort: split
    from deepspeed.comm.torch import build_shm_op

    return build_shm_op()


def test_nothing_is_compiled_at_start_up() -> None:
    """DeepSpeed would compile a shared-memory all-reduce, a minute, that nothing here uses."""
    assert run_on_ranks(compiled_at_start_up, 1) == [None]


def loads_a_compiler() -> bool:
    engine_of(config("gpt2", zero=1, precision="bf16"))
    return "torch._inductor.compile_fx" in sys.modules


def test_no_compiler_is_loaded_at_start_up() -> None:
    """DeepSpeed would load its own Muon, and with it torch's compiler, to compare a class."""
    assert run_on_ranks(loads_a_compiler, 1) == [False]


def collections_at_start_up() -> int:
    with patch("gc.collect") as collect:
        engine_of(config("gpt2", zero=1, precision="bf16"))
    return collect.call_count


def test_no_garbage_is_collected_at_start_up() -> None:
    """DeepSpeed's bf16 optimizer would, before and after each group of parameters."""
    assert run_on_ranks(collections_at_start_up, 1) == [0]


def norm_without_the_first_gradient() -> float:
    engine = engine_of(config("gpt2"))
    first, *rest = engine.runner.parameters
    for parameter in rest:
        parameter.grad = torch.ones_like(parameter)
    norm = engine.runner.grad_norm()
    assert first.grad is None
    return float(norm) / math.sqrt(sum(p.numel() for p in rest))


def test_a_parameter_without_a_gradient_does_not_count_in_the_norm() -> None:
    assert run_on_ranks(norm_without_the_first_gradient, 1) == [pytest.approx(1.0)]


def overflow_step(cfg: Any) -> list[tuple[float, bool, float]]:
    allow_fp16_on_the_cpu()
    engine = engine_of(cfg)
    engine.loss_scale.cur_scale.fill_(2.0**24)
    results = []
    for number, step in enumerate(batches()):
        result = engine.train_step(rank_batches(step, engine.shape, engine.layout), step=number)
        results.append(
            (float(engine.loss_scale.cur_scale), bool(result.skipped), float(result.grad_norm))
        )
    return results


@pytest.mark.parametrize("zero", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_a_loss_scale_that_overflows_is_halved_until_it_does_not(zero: int) -> None:
    """Exactly the steps that overflow are left out, and most of ten steps are not."""
    for results in run_on_ranks(overflow_step, 2, config("gpt2", precision="fp16", zero=zero)):
        scale = 2.0**24
        for found, skipped, norm in results:
            scale /= 2 if skipped else 1
            assert (found, skipped) == (scale, not math.isfinite(norm))
        assert 2 <= sum(skipped for _, skipped, _ in results) <= 7 and not results[-1][1]


def refuse_fp16(cfg: Any) -> None:
    from deepspeed.accelerator import get_accelerator

    from pipeline.errors import ConfigError

    get_accelerator().is_fp16_supported = lambda: False
    with pytest.raises(
        ConfigError,
        match="fp16 is not supported on this device. Set training.precision=bf16 or fp32",
    ):
        engine_of(cfg)


def test_fp16_is_refused_where_the_device_has_none() -> None:
    run_on_ranks(refuse_fp16, 1, config("gpt2", precision="fp16"))


def nan_step(cfg: Any) -> list[tuple[bool, float]]:
    import torch

    engine = engine_of(cfg)
    results = []
    for number, step in enumerate(batches()[:3]):
        parts = rank_batches(step, engine.shape, engine.layout)
        if number == 1:
            parts[0].loss_mask = torch.full(parts[0].labels.shape, math.nan)
        result = engine.train_step(parts, step=number)
        results.append((bool(result.skipped), float(result.loss)))
    return results


@pytest.mark.parametrize(
    "zero, precision",
    [
        (0, "fp32"),
        (2, "bf16"),
        *(
            pytest.param(*how, marks=pytest.mark.slow)
            for how in ((1, "fp32"), (1, "bf16"), (3, "fp32"))
        ),
    ],
)
def test_a_nan_batch_is_left_out_and_training_goes_on(zero: int, precision: str) -> None:
    cfg = config("gpt2", zero=zero, precision=precision)
    for results in run_on_ranks(nan_step, 2, cfg):
        assert [skipped for skipped, _ in results] == [False, True, False]
        assert math.isfinite(results[2][1])


@pytest.mark.slow  # DeepSpeed compiles its CPU Adam first
def test_an_offloaded_optimizer_gives_the_same_results() -> None:
    [got] = run_on_ranks(train_all, 1, [config("gpt2", offload=True)], [{}])[0]
    for have, want in zip(got["history"], reference(config("gpt2"))):
        assert have == pytest.approx(want, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_nan_batch_is_left_out_by_an_offloaded_optimizer(zero: int) -> None:
    [results] = run_on_ranks(nan_step, 1, config("gpt2", zero=zero, offload=True))
    assert [skipped for skipped, _ in results] == [False, True, False]
    assert math.isfinite(results[2][1])


def test_learning_rates_follow_groups() -> None:
    """optimizer.lr_scale multiplies the schedule for the names it matches."""
    cfg = config("gpt2")
    cfg = replace(cfg, optimizer=replace(cfg.optimizer, lr_scale={"embedding.*": 0.5}))
    rates = run_on_ranks(group_rates, 1, cfg)[0]
    assert rates == pytest.approx(
        [0.5 * 1.5e-3, 1.5e-3, 1.5e-3]
    )  # first of two warm-up steps of 3e-3


def group_rates(cfg: Any) -> list[float]:
    engine = engine_of(cfg)
    engine.train_step(rank_batches(batches()[0], engine.shape, engine.layout), step=0)
    return sorted(group["lr"] for group in engine.runner.optimizer.param_groups)


RAMP = [(6, 16), (6, 16), (6, 32), (12, 32), (12, 16), (6, 32)]
"""Sequences of a step and their length: 3, 3, 3, 6, 6, 3 micro-batches, or a third at three ranks."""


def ramp_steps() -> list[dict[str, Any]]:
    return [
        {name: rows[:n, :length] for name, rows in step.items()}
        for step, (n, length) in zip(batches(), RAMP)
    ]


def ramped(cfgs: list[Any]) -> list[list[tuple[float, float]]]:
    histories = []
    for cfg in cfgs:
        engine = engine_of(cfg)
        parts = [rank_batches(step, engine.shape, engine.layout) for step in ramp_steps()]
        results = [engine.train_step(part, step=number) for number, part in enumerate(parts)]
        histories.append([(float(result.loss), float(result.grad_norm)) for result in results])
        reset_parallel_state()
    return histories


@pytest.mark.parametrize(
    "world_size, layouts",
    [
        pytest.param(
            1,
            [dict(zero=0), dict(zero=1, precision="bf16"), dict(zero=2), dict(zero=3)],
            marks=pytest.mark.slow,
        ),
        (2, [dict(pp=2), dict(tp=2)]),
        pytest.param(3, [dict(pp=3), dict(batch_size=12)], marks=pytest.mark.slow),
        pytest.param(
            6,
            [
                dict(tp=2, pp=3, sp=True),
                dict(pp=3, micro_batch_size=1),
                dict(tp=2, zero=2, batch_size=12),
                dict(zero=3, batch_size=12, micro_batch_size=1),
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_ramp_may_change_the_number_and_length_of_micro_batches(
    world_size: int, layouts: list[dict[str, Any]]
) -> None:
    """DeepSpeed counts micro-batches over the whole run: after a change it would make its step amid a batch."""
    check_ramp(world_size, layouts)


@pytest.mark.slow  # DeepSpeed compiles its CPU Adam first
def test_a_ramp_with_an_offloaded_optimizer() -> None:
    """Its sums lie on the host; DeepSpeed reads them by the number of micro-batches that it was built for, here 8, and 1, after
    which steps have 2."""
    sizes = (dict(), dict(micro_batch_size=6, batch_size=6))
    check_ramp(1, [dict(zero=zero, offload=True, **size) for zero in (1, 2) for size in sizes])


def check_ramp(world_size: int, layouts: list[dict[str, Any]]) -> None:
    cfg = config("gpt2")
    shape = derive(cfg, world_size=1, tokenizer_vocab_size=VOCAB)
    expected = ReferenceGPT(cfg, VOCAB).train(ramp_steps(), shape, cfg.training.micro_batch_size)
    for layout, found in zip(
        layouts, run_on_ranks(ramped, world_size, [config("gpt2", **x) for x in layouts])[0]
    ):
        tolerance = 3e-2 if "precision" in layout else 1e-4 if "offload" in layout else 1e-5
        assert [x for pair in found for x in pair] == pytest.approx(
            [x for pair in expected for x in pair], rel=tolerance
        )


def norm_without_whole_gradients() -> str:
    """Where the norm lies at ZeRO-0 if only matrices that tensor-parallel ranks share are trained."""
    from deepspeed.accelerator import get_accelerator

    from pipeline.engine.deepspeed.plain import PlainRunner

    get_accelerator().current_device_name = lambda: "meta"
    runner = object.__new__(PlainRunner)
    frozen = torch.nn.Parameter(torch.ones(2))
    layout = SimpleNamespace(tensor=None, expert=None)
    vars(runner).update(is_unsharded=True, layout=layout, _whole=[frozen], _split=[], _experts=[])
    return runner.grad_norm().device.type


def test_a_norm_of_no_gradient_is_on_the_device() -> None:
    """It was a number of the CPU, to which CUDA adds none: fp32 runs with tensor parallelism that train linears alone."""
    assert run_on_ranks(norm_without_whole_gradients, 1) == ["meta"]
