"""The memory of each stage against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.model import MoeConfig
from pipeline.model.loss import CHUNK_BYTES, chunks
from pipeline.planning import kept
from pipeline.planning.flops import num_parameters
from pipeline.planning.job import Job
from pipeline.planning.memory import PARTS, StageMemory, memory_of_stages, most_loaded
from tests.support.planned_run import run_of


def memory_of(*settings: str, world_size: int = 8) -> list[StageMemory]:
    return memory_of_stages(Job.of(*run_of(*settings, world_size=world_size)))


def test_weights_gradients_and_optimizer_of_a_known_model():
    """GPT-3 6.7B: P parameters; bf16 weights 2P, fp32 gradients 4P, ZeRO-1 over 8 ranks (4 + 8) P / 8."""
    parameters = 32 * (12 * 4096**2 + 13 * 4096) + 50304 * 4096 + 2048 * 4096 + 2 * 4096
    (found,) = memory_of("training.micro_batch_size=1")
    assert found.weights == 2 * parameters
    assert found.gradients == 4 * parameters
    assert found.optimizer == 12 * parameters / 8


def test_spread_experts_are_whole_on_fewer_ranks():
    """Mixtral on 16 ranks: an expert a layer on each of 8, two copies, which share its fp32 state; the rest in 16."""
    words = ["model=mixtral-8x7b", "training.micro_batch_size=1", "parallel=ep8"]
    (found,) = memory_of(*words, world_size=16)
    experts = 32 * 8 * 3 * 4096 * 14336
    rest = 32 * (4096 * (4096 + 2 * 1024) + 4096**2 + 2 * 4096 + 8 * 4096) + 2 * 50304 * 4096 + 4096
    assert found.weights == 2 * (rest + experts / 8)
    assert found.gradients == 4 * (rest + experts / 8)
    assert found.optimizer == 12 * (rest / 16 + experts / 8 / 2)
    (alone,) = memory_of(*words, "parallel.expert_parallel_size=1", world_size=16)
    assert alone.weights == 2 * (rest + experts)
    assert alone.optimizer == 12 * (rest + experts) / 16


def test_what_a_gpt_block_keeps_is_the_papers_count_without_masks():
    """16 H numbers a token: input, sum, two norms' outputs (4), q, k, v, context (4), around GELU (8): the paper's 34
    bytes of H (arXiv:2205.05198, section 4) less dropout masks. And fp32: 4 statistics, log-sum-exp of 32 heads."""
    cfg, shape = run_of("training.micro_batch_size=2")
    tokens = 2 * 2048
    expected = tokens * (32 * 4096 + 4 * 4 + 32 * 4)
    assert kept.block_bytes(Job.of(cfg, shape)) == expected
    dropped = replace(cfg, model=replace(cfg.model, hidden_dropout=0.1))
    assert kept.block_bytes(Job.of(dropped, shape)) == expected + tokens * 2 * 4096


def test_a_mixture_keeps_what_each_choice_makes_and_its_tokens_once():
    """Gate and up, the gate's half, their product, and the product weighted by the router: five inner widths a choice,
    where a dense gated MLP keeps four. Ranks that split every expert gather the tokens; others are sent theirs."""
    words = ["model=mixtral-8x7b", "training.micro_batch_size=1"]
    split = ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"]
    for more, tensor, sent in (
        ([], 1, 1),
        (split, 2, 1),
        ([*split, "parallel.expert_parallel_size=8"], 2, 2),
    ):
        cfg, shape = run_of(*words, *more)
        dense = replace(cfg, model=replace(cfg.model, moe=MoeConfig()))
        found = kept.block_bytes(Job.of(cfg, shape)) - kept.block_bytes(Job.of(dense, shape))
        inner = (2 * 5 - 4) * 14336 / tensor
        assert found == 4096 * 2 * (inner + 2 * 4096 / sent), more


def test_one_product_of_experts_has_the_gradients_of_all_at_once():
    """Mixtral's eight: 8 x 2 x F x H of bf16, those of gate and up, where a loop holds one expert's."""
    inner, one = 2 * 4096 * 14336 * 2, 14336 * 4096 * 2
    words = ["model=mixtral-8x7b", "training.micro_batch_size=1"]
    for more, expected in (
        ([], 8 * 2 * one - inner),
        (["parallel.zero_stage=3"], inner * 2),
        (["training.precision=fp16", "parallel.zero_stage=2"], inner * 2),
        (["parallel.expert_parallel_size=8"], inner * 2),
    ):
        job = Job.of(*run_of(*words, *more))
        hidden = 4096 * 4096 * 2
        assert kept.backward_bytes(job) == hidden + expected, more


def test_a_plain_engine_keeps_every_block_and_the_last_output():
    (found,) = memory_of("training.micro_batch_size=2")
    block = 2 * 2048 * (32 * 4096 + 16 + 128)
    assert found.activations == 32 * block + 2 * 2048 * 4096 * 2
    (found,) = memory_of("training.micro_batch_size=2", "training.recompute=full")
    assert found.activations == (32 + 1) * 2 * 2048 * 4096 * 2


def test_sequence_parallel_splits_all_of_a_block():
    words = ["parallel.tensor_parallel_size=4", "training.micro_batch_size=1"]
    plain, split = (
        Job.of(*run_of(*words, *more)) for more in ([], ["parallel.sequence_parallel=true"])
    )
    statistics = 2048 * 4 * 4
    assert kept.block_bytes(plain) == 2048 * (2 * 4096 * (4 + 12 / 4) + 128 / 4) + statistics
    assert kept.block_bytes(split) == 2048 * (2 * 4096 * 16 / 4 + 128 / 4) + statistics / 4


def test_the_first_stage_holds_most_micro_batches_and_the_last_the_loss():
    """1F1B over four stages: 4, 3, 2 and 1 micro-batches in flight."""
    words = ["parallel.pipeline_parallel_size=4", "training.micro_batch_size=1"]
    job = Job.of(*run_of(*words))
    assert [job.micro_batches_in_flight(stage) for stage in job.stages] == [4, 3, 2, 1]
    found = memory_of(*words)
    assert [m.moment for m in found] == ["backward", "backward", "backward", "loss"]
    assert found[0].activations > found[1].activations > found[2].activations
    assert most_loaded(memory_of_stages(job)).stage == 0


def test_stages_together_hold_the_model_once():
    """And the tied embedding twice: at both ends, each whole."""
    cfg, shape = run_of("parallel.pipeline_parallel_size=4", "training.micro_batch_size=1")
    held = sum(stage.parameters for stage in Job.of(cfg, shape).stages)
    assert held == num_parameters(cfg.model, 50304) + 50304 * 4096
    (whole,) = Job.of(*run_of("training.micro_batch_size=1")).stages
    assert whole.parameters == num_parameters(cfg.model, 50304)


def test_tensor_parallelism_does_not_split_norms_and_row_biases():
    (stage,) = Job.of(*run_of("parallel.tensor_parallel_size=8")).stages
    split = 32 * (12 * 4096**2 + 7 * 4096) + 51200 * 4096  # padded to 128 rows a rank
    whole = 32 * 6 * 4096 + 2048 * 4096 + 2 * 4096
    assert stage.parameters == split / 8 + whole


def test_logits_are_cut_as_the_loss_cuts_them():
    """By its own function, given what has the shapes of 6.7B's hidden states and output weight on CUDA."""
    assert kept.LOSS_CHUNK_BYTES == CHUNK_BYTES["cuda"]
    hidden: Any = SimpleNamespace(
        is_cuda=True, device=SimpleNamespace(type="cuda"), shape=(5 * 2048, 4096)
    )
    for tensor, wanted in (1, 5), (8, 1):
        columns = {1: 50304, 8: 51200}[tensor] // tensor  # padded to 128 a rank
        parts = list(chunks(hidden, SimpleNamespace(shape=(columns, 4096))))  # type: ignore[arg-type]
        found = kept.LossChunks.of(
            Job.of(*run_of("training.micro_batch_size=5", f"parallel.tensor_parallel_size={tensor}",
                           "training.global_batch_size=40"))
        )  # fmt: skip
        assert found.count == len(parts) == wanted
        assert found.whole == min(parts[0].stop, 5 * 2048) * columns * 4
        assert found.last == (5 * 2048 - parts[-1].start) * columns * 4


def test_a_compiled_loss_holds_raw_logits_and_their_gradient():
    """Measured on an H200: 125M at 32 x 1,024 tokens held 12.0 GiB of tensors, where 12.9 were planned without."""
    words = ["model=gpt3-125m", "training.seq_len=1024", "training.micro_batch_size=32",
             "training.global_batch_size=32"]  # fmt: skip
    (eager,), (compiled,) = (
        memory_of(*words, f"model.compile={compiled}", world_size=1) for compiled in (False, True)
    )
    chunk = 2048 * 50304
    # fp32 copy and probabilities are in registers, and the gradient is in bf16.
    assert eager.moment == compiled.moment == "loss"
    assert eager.tensors - compiled.tensors == chunk * (4 + 4 - 2)
    assert compiled.tensors / 2**30 == pytest.approx(12.0, abs=0.05)


def test_one_fp32_rank_needs_no_second_copy_whatever_stage_is_set():
    """Nothing is partitioned there: stage 0 runs, which updates the weights themselves (4 bytes each, gradients 4,
    moments 8)."""
    words = ["model=gpt2-124m", "training.precision=fp32", "training.micro_batch_size=1"]
    for stage in (1, 2, 3):
        cfg, shape = run_of(*words, f"parallel.zero_stage={stage}", world_size=1)
        (found,), parameters = (
            memory_of_stages(Job.of(cfg, shape)),
            num_parameters(cfg.model, 50304),
        )
        assert shape.zero_stage == 0
        assert found.optimizer == 8 * parameters
        assert found.weights == found.gradients == 4 * parameters
    (found,) = memory_of(*words, "parallel.zero_stage=3", world_size=2)
    assert found.optimizer == 12 * parameters / 2


def test_muon_keeps_one_number_of_a_matrix_and_adamw_two_of_the_rest():
    """12 H^2 a block in matrices: fp32 copy and momentum, 8 bytes; the others 12; over 8 ranks."""
    matrices = 32 * 12 * 4096**2
    rest = 32 * 13 * 4096 + 50304 * 4096 + 2048 * 4096 + 2 * 4096
    (found,) = memory_of("training.micro_batch_size=1", "optimizer=muon")
    assert found.optimizer == (8 * matrices + 12 * rest) / 8
    stages = memory_of("parallel.pipeline_parallel_size=4", "optimizer=muon")
    middle = 8 * (8 * 12 * 4096**2 + 12 * 13 * 4096)  # of eight blocks
    assert stages[1].optimizer == middle / 2


def test_zero_2_keeps_large_gradients_until_the_end_of_a_backward_pass():
    """Of 6.7B, qkv, fc1 and fc2 are above a bucket of 40 M numbers; rehearsed: 5.7 % too low without them."""
    words = ["training.micro_batch_size=1", "training.recompute=full", "parallel.zero_stage=2"]
    (found,) = memory_of(*words)
    assert found.moment == "embedding"
    large, table, hidden = 32 * 11 * 4096**2 * 2 / 8, 50304 * 4096 * 2, 2048 * 4096 * 2
    assert found.temporaries == large + 3 * table + hidden + 2 * 40_000_000 * 2


def test_parts_add_up_and_are_printed():
    (found,) = memory_of("training.micro_batch_size=1")
    assert found.tensors == sum(getattr(found, part) for part in PARTS)
    assert found.total == pytest.approx(found.tensors * 1.03 + 1.5 * 2**30)
    assert str(found).startswith(
        f"{found.total / 2**30:.1f} GiB: weights {found.weights / 2**30:.1f} GiB, "
    )
    small = replace(found, weights=5.2 * 2**20, gradients=0, optimizer=40 * 2**20)
    assert "weights 5.2 MiB, gradients 0 MiB, optimizer 40 MiB" in str(small)
