"""Seconds of a step against hand-worked parts and against published runs."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.planning import communication
from pipeline.planning import step_time as module
from pipeline.planning.devices import load_device
from pipeline.planning.job import Job
from pipeline.planning.plan import FASTEST, SLOWEST
from pipeline.planning.step_time import step_time
from tests.support.planned_run import run_of
from tests.support.published_runs import published_runs, rows_page, summary_rows

H100 = load_device("h100")
ROOT = Path(__file__).resolve().parents[2]
RUNS = list(published_runs())


def job_of(*settings: str, world_size: int = 8) -> Job:
    return Job.of(*run_of("training.micro_batch_size=2", *settings, world_size=world_size))


def test_causes_add_up_to_the_step():
    found = step_time(job_of(), H100)
    assert found.total == pytest.approx(sum(found.by_cause.values()))
    assert found.unexplained == pytest.approx(0.04 / 1.04 * found.total)


def test_large_products_run_at_the_devices_share_of_its_peak():
    """6.7B: 2 * 12 H^2 operations a token and block forward, three times that in all, and the head's."""
    found = step_time(job_of(), H100)
    tokens = 64 * 2048 / 8
    products = 3 * 2 * tokens * (32 * 12 * 4096**2 + 50304 * 4096)
    at_full_share = products / (H100.peak * H100.matrix_share)
    assert at_full_share < found.matrices < 1.1 * at_full_share  # sides of 4,096 fill the tiles


def test_tokens_travel_to_their_experts_and_back():
    """Two choices of 2 x 4,096 tokens of 4,096 numbers, four times; an eighth stays, and the link gives three quarters."""
    words = ["model=mixtral-8x7b", "parallel=ep8"]
    found = step_time(job_of(*words), H100)
    sent = 4 * (2 * 2 * 4096) * 4096 * 2 * 7 / 8
    link = 0.75 * H100.link_bytes_s(spans_nodes=False)
    assert found.expert_parallel == pytest.approx(4 * 32 * sent / link)
    again = step_time(job_of(*words, "training.recompute=full"), H100)
    assert again.expert_parallel == pytest.approx(1.5 * found.expert_parallel)
    assert step_time(job_of("model=mixtral-8x7b"), H100).expert_parallel == 0.0


def test_experts_with_one_copy_have_nothing_to_reduce():
    """Their gradients are whole where they are: what is left is the rest of the model's."""
    words = ["model=mixtral-8x7b", "parallel.pipeline_parallel_size=2"]
    spread = step_time(job_of(*words, "parallel.expert_parallel_size=4"), H100).data_parallel
    alike = step_time(job_of(*words), H100).data_parallel
    assert spread < alike / 10


def test_full_recompute_costs_a_forward_pass_and_one_schedule_waits_less():
    plain, again = step_time(job_of(), H100), step_time(job_of("training.recompute=full"), H100)
    forward = plain.matrices / 3 + plain.attention / 3.5 + plain.element_wise / 3
    assert again.recomputed == pytest.approx(forward, rel=0.05)  # the head is not recomputed
    words = ["parallel.pipeline_parallel_size=4", "training.micro_batch_size=1"]
    one = step_time(job_of(*words), H100)
    dual = step_time(job_of(*words, "parallel.pipeline_schedule=dualpipev"), H100)
    assert one.bubble > 0 and dual.bubble < 0.75 * one.bubble
    # A third of a stage's products are those of its weights' gradients, which nobody waits for.
    before = step_time(job_of(*words), H100, module.Practice(gradient_first=False))
    saved = 3 * 8 * module._block(job_of(*words), H100, module.Practice()).matrices
    assert before.bubble - one.bubble == pytest.approx(saved)


def test_a_collective_between_nodes_uses_all_links_of_a_node():
    """Eight members of a node share eight links; under tensor parallelism 8 one member has one."""
    assert communication._ring_bytes_s(job_of(), H100) == 450e9
    assert communication._ring_bytes_s(job_of(world_size=16), H100) == 8 * 50e9
    words = ["parallel.tensor_parallel_size=8"]
    assert communication._ring_bytes_s(job_of(*words, world_size=16), H100) == 50e9


def test_stages_of_a_job_of_several_nodes_are_a_network_apart():
    """Neighbours are all ranks of a stage apart: two stages of eight ranks each never share a node of eight."""
    words, sent = ["parallel.pipeline_parallel_size=2"], 0.3 * 2 * (2 * 2048 * 4096 * 2)
    for world_size, link in ((8, 450e9), (16, 50e9)):
        job = job_of(*words, world_size=world_size)
        expected = sent / (0.75 * link) * job.num_micro_batches
        assert step_time(job, H100).between_stages == pytest.approx(expected)


def test_each_expert_multiplies_its_own_tokens():
    """Two of eight: a quarter of the rows for each; spread over eight ranks, as many from each of them."""
    job, tokens = job_of("model=mixtral-8x7b"), 2 * 4096
    dense = 2 * (4096 * (4096 + 2 * 1024) + 4096**2 + 8 * 4096)
    experts, whole = 2 * 2 * 3 * 4096 * 14336, module._share_of_peak(H100, 4096, 4096, tokens)
    for more, rows in (([], tokens / 4), (["parallel=ep8"], 2 * tokens)):
        own = module._share_of_peak(H100, 4096, 4096, rows)
        expected = tokens / H100.peak * (dense / whole + experts / own)
        job = job_of("model=mixtral-8x7b", *more)
        assert module._product_seconds(job, H100) == pytest.approx(expected), more


def test_many_small_experts_wait_for_the_host():
    """128 a block, one after another: 20 launches of each, and those of the block."""
    words = ["model=qwen3-moe-30b", "training.micro_batch_size=1"]
    block = module._block(job_of(*words), H100, module.Practice())
    assert block.launches > 0
    assert block.total == pytest.approx(5e-6 * (60 + 128 * 20))
    spread = module._block(job_of(*words, "parallel=ep8"), H100, module.Practice())
    assert spread.launches < block.launches / 4


def test_zero_2_reduces_every_micro_batch_and_a_slow_link_shows_it():
    slow = replace(H100, node_gb_s=1.0)
    one, two = (
        step_time(job_of(f"parallel.zero_stage={stage}"), slow).data_parallel for stage in (1, 2)
    )
    assert two > 3 * one  # four micro-batches


def test_frozen_matrices_spare_a_third_of_the_products():
    full, lora = step_time(job_of(), H100), step_time(job_of("finetune=lora"), H100)
    head = 3 * 2 * (64 * 2048 / 8) * 50304 * 4096 / (H100.peak * H100.matrix_share)
    assert (lora.matrices - head) / (full.matrices - head) == pytest.approx(2 / 3, rel=0.02)


def test_small_blocks_wait_for_the_host():
    """tiny on an H100: 60 launches of 5 us take longer than the work."""
    found = step_time(job_of("model=tiny", "training.micro_batch_size=1"), H100)
    blocks = 4 * 8  # micro-batches
    assert found.launches == pytest.approx(blocks * 60 * 5e-6, rel=0.2)
    assert step_time(job_of(), H100).launches == 0


# ---- published runs ------------------------------------------------------------------------------


def test_at_least_eight_rows_are_held_out():
    assert sum(not run.fitted for run in RUNS) >= 8


def test_the_pages_have_every_row_with_the_errors_that_the_formula_has_now():
    """None is hidden, and a change of the formula shows what it does to all of them."""
    written = (ROOT / "docs" / "plan-rows.md").read_text()
    assert written == rows_page(), "python -m tests.support.published_runs > docs/plan-rows.md"
    summary = (ROOT / "docs" / "plan.md").read_text()
    assert [row for row in summary_rows() if row not in summary] == []


def test_the_range_holds_nine_in_ten_of_the_held_out_runs():
    ratios = [1 / (1 + run.speed_error) for run in RUNS if not run.fitted]
    inside = sum(SLOWEST <= ratio <= FASTEST for ratio in ratios)
    assert inside >= 0.9 * len(ratios)


def test_the_typical_held_out_error_is_what_the_page_says():
    errors = [abs(run.speed_error) for run in RUNS if not run.fitted]
    assert statistics.median(errors) < 0.10
