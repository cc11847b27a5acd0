"""The memory estimate against numbers worked out by hand."""

from dataclasses import replace

import pytest

from pipeline.planning.advice import estimate_of_run
from pipeline.planning.flops import num_parameters
from tests.support.planned_run import run_of

GIB = 2**30


def test_weights_gradients_and_optimizer_of_a_known_model():
    """GPT-3 6.7B: P parameters; bf16 weights 2P, fp32 gradients 4P, ZeRO-1 over 8 ranks (4 + 8) P / 8."""
    cfg, shape = run_of("training.micro_batch_size=1")
    parameters = 32 * (12 * 4096**2 + 13 * 4096) + 50304 * 4096 + 2048 * 4096 + 2 * 4096
    found = estimate_of_run(cfg, shape)
    assert found.weights == pytest.approx(2 * parameters / GIB, rel=1e-3)
    assert found.gradients == pytest.approx(4 * parameters / GIB, rel=1e-3)
    assert found.optimizer == pytest.approx(12 * parameters / 8 / GIB, rel=1e-3)


def test_activations_of_a_gpt_layer():
    """A dense GPT layer: 5 h (inputs, norms, residuals) + 4 h (q, k, v, context) + 8 h (before and after GELU) = 17 h
    numbers a token, 34 s b h bytes in bf16, the paper's count without dropout masks and scores."""
    cfg, shape = run_of("training.micro_batch_size=2")
    assert estimate_of_run(cfg, shape).activations == pytest.approx(32 * 34 * 2048 * 2 * 4096 / GIB)
    cfg, shape = run_of("training.micro_batch_size=2", "training.recompute=full")
    expected = (32 * 2 * 2048 * 2 * 4096 + 34 * 2048 * 2 * 4096) / GIB
    assert estimate_of_run(cfg, shape).activations == pytest.approx(expected)


def test_sequence_parallel_splits_all_of_a_layer():
    cfg, shape = run_of("parallel.tensor_parallel_size=4", "training.micro_batch_size=1")
    plain = estimate_of_run(cfg, shape).activations
    split = estimate_of_run(
        replace(cfg, parallel=replace(cfg.parallel, sequence_parallel=True)), shape
    ).activations
    assert plain == pytest.approx(32 * 2 * 2048 * 4096 * (5 + 12 / 4) / GIB)
    assert split == pytest.approx(32 * 2 * 2048 * 4096 * 17 / 4 / GIB)


def test_one_fp32_rank_needs_no_second_copy_whatever_stage_is_set():
    """Nothing is partitioned there: stage 0 runs, which updates the weights themselves (4 bytes each, gradients 4,
    moments 8)."""
    words = ["model=gpt2-124m", "training.precision=fp32", "training.micro_batch_size=1"]
    for stage in (1, 2, 3):
        cfg, shape = run_of(*words, f"parallel.zero_stage={stage}", world_size=1)
        found, parameters = estimate_of_run(cfg, shape), num_parameters(cfg.model, 50304)
        assert shape.zero_stage == 0
        assert found.optimizer == pytest.approx(8 * parameters / GIB)
        assert found.weights == found.gradients == pytest.approx(4 * parameters / GIB)
    cfg, shape = run_of(*words, "parallel.zero_stage=3", world_size=2)
    assert shape.zero_stage == 3
    assert estimate_of_run(cfg, shape).optimizer == pytest.approx(12 * parameters / 2 / GIB)
