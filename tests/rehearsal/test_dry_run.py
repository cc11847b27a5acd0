"""A rank of a large job on CUDA, rehearsed where there is none: placement, memory, collectives, nothing read back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import derive
from pipeline.errors import ConfigError, MachineError
from pipeline.planning.job import Job
from pipeline.planning.memory import memory_of_stages
from pipeline.rehearsal import dry_run, fake_cuda
from pipeline.rehearsal.dry_run import RankProcess, Report, rehearse
from tests.rehearsed_presets import MOST
from tests.support.layouts import VOCAB, config

needs_compiler = pytest.mark.skipif(fake_cuda.compiler() is None, reason="no C++ compiler")
GIB = 2**30


def preset(*overrides: str) -> PretrainConfig:
    return cli.compose(
        PretrainConfig, ["name=rehearsal", "data.path=none", *overrides], config="pretrain"
    )


def calls(report: Report, group: str) -> Counter[tuple[str, str]]:
    """(operation, dtype) -> how many calls of a group in the last step."""
    found = [c for c in report.collectives if c.group == group]
    return Counter({(c.operation, c.dtype): c.count for c in found})


def check_sound(report: Report) -> None:
    """What must hold of every rank at every layout."""
    assert report.device == "cuda:0" and report.devices == ["cuda:0"]
    assert report.host_reads == {} and report.host_waits == {}
    # What is computed again starts from the CPU generator's state, which stays where it is.
    assert set(report.host_tensors) <= {"aten.clone.default"}
    assert report.peak_bytes >= report.live_bytes >= report.built_bytes > 0


@needs_compiler
def test_a_rank_of_a_pipeline_is_on_its_one_device_and_reads_nothing_back(
    rank_process: RankProcess,
) -> None:
    """Rank 7 of a node that sees one device: DeepSpeed took LOCAL_RANK, 7, for its number."""
    cfg = config("modern", tp=2, pp=2, sp=True, precision="bf16")
    report = rehearse(cfg, rank=7, world_size=8, tokenizer_vocab_size=VOCAB, process=rank_process)
    check_sound(report)
    assert (report.pipeline_rank, report.data_rank, report.tensor_rank) == (1, 1, 1)
    assert set(report.attention_kernels) == {"flash"}
    # Gradient sums are reduced as what they are, in fp32, in place.
    (reduced,) = [c for c in report.collectives if (c.group, c.operation) == ("data", "allreduce")]
    assert reduced.dtype == "float32" and reduced.num_bytes >= 4 * report.num_parameters
    # Two a micro-batch for the loss, and one a step for all gradients that ranks have parts of.
    sums = calls(report, "tensor")["allreduce", "float32"]
    assert sums == 2 * report.num_micro_batches + 1


@needs_compiler
@pytest.mark.slow
def test_a_mixture_in_fp32_with_shared_key_heads_takes_a_kernel_without_scores(
    rank_process: RankProcess,
) -> None:
    """Without Transformer Engine the router named what was not there; fp32 and groups took plain attention."""
    report = rehearse(
        config("moe"), rank=1, world_size=2, tokenizer_vocab_size=VOCAB, process=rank_process
    )
    assert report.devices == ["cuda:0"]
    assert set(report.attention_kernels) == {"efficient"}


def test_the_step_behind_every_ramp_is_rehearsed() -> None:
    """It is compared with a plan of that step; the first one of a ramp has fewer micro-batches."""
    words = ["model=tiny", "parallel.pipeline_parallel_size=4", "training.micro_batch_size=1"]
    words += ["training.global_batch_size=64", "training.total_steps=200"]
    cfg = preset(*words, "training.ramp=[{until_step: 50, global_batch_size: 2}]")
    shape = derive(cfg, world_size=4, tokenizer_vocab_size=VOCAB)
    assert shape.at(0).num_micro_batches == 2
    assert dry_run._enough_micro_batches(cfg, shape) == 4


def test_what_cannot_be_rehearsed_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a process is started."""
    monkeypatch.setattr(dry_run.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(ConfigError, match="rank=2 must be from 0 to world_size - 1 = 1"):
        rehearse(config(), rank=2, world_size=2, tokenizer_vocab_size=VOCAB)
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(zero=3, precision="bf16"), "zero_stage=3 cannot be rehearsed"),
        (dict(zero=2, offload=True), "offload_optimizer=true cannot be rehearsed"),
        (dict(model="moe", ep=2), "expert_parallel_size=2 cannot be rehearsed"),
        (dict(model="moe", tp=2, sp=True), "tensor_parallel_size=2 ranks cannot be rehearsed"),
    ]
    for settings, message in cases:
        with pytest.raises(ConfigError, match=message):
            rehearse(config(**settings), rank=0, world_size=2, tokenizer_vocab_size=VOCAB)


def test_a_machine_that_cannot_stand_in_for_a_device_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    (tmp_path / "version.py").write_text("cuda: Optional[str] = None\nhip: Optional[str] = None\n")
    monkeypatch.setattr(fake_cuda, "_torch_folder", lambda: tmp_path)
    with pytest.raises(MachineError, match=r"install g\+\+, or set CXX"):
        fake_cuda.check_machine()
    (tmp_path / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    with pytest.raises(MachineError, match="this one is for cuda 13.0"):
        fake_cuda.check_machine()


@needs_compiler
def test_a_rank_that_fails_says_why_and_others_run(rank_process: RankProcess) -> None:
    """Each is a process of its own."""
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed:\n(.|\n)*KeyError: 'settings'"):
            rank_process.run({"rank": 1, "world_size": 2})


GPT3_175B = ("experiment=gpt3-175b",)
GPT3_67B = ("model=gpt3-6.7b", "training.micro_batch_size=1")
# Experts that are spread over ranks cannot be rehearsed: 16 stages hold them all.
EXPERTS = (
    "parallel.pipeline_parallel_size=16", "training.micro_batch_size=1", "training.recompute=full",
)  # fmt: skip
MIXTRAL = ("model=mixtral-8x7b", *EXPERTS, "training.global_batch_size=64")
# 4 micro-batches: 16, as above, took 100 s of a core for three blocks of 128 experts.
QWEN3 = ("model=qwen3-moe-30b", *EXPERTS, "training.global_batch_size=8")
# Most GiB of tensors: what the run needs, and no more (2026-11-28: 19.8, 55.5, 33.8, 59.4, 109.2; 50.4, 39.1, 22.9).
LARGE: dict[str, tuple[tuple[str, ...], int, int, float]] = {
    # The ends, and of the stages between, which hold the same blocks, those with most and fewest micro-batches in flight.
    **{f"175B, stage {stage}": (GPT3_175B, 64 * stage, 1024, 20.0) for stage in (0, 1, 8, 14, 15)},
    "6.7B ZeRO-1": ((*GPT3_67B, "parallel.zero_stage=1"), 3, 8, 56.0),
    "6.7B ZeRO-2": ((*GPT3_67B, "parallel.zero_stage=2"), 3, 8, 34.5),
    "modern-7b": (("model=modern-7b", "training.recompute=full"), 0, 8, 60.0),
    "mixture": (("model=modern-1.3b", "model.moe.num_experts=8"), 0, 8, 110.0),
    "128k tokens": (("experiment=modern-7b-128k",), 0, 64, 51.0),
    "mixtral-8x7b": (MIXTRAL, 0, 32, 40.0),
    "qwen3-moe-30b": (QWEN3, 6, 32, 23.3),
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_rank_of_a_large_job_starts_fits_and_steps(name: str, rank_process: RankProcess) -> None:
    """A thousand GPUs wait for nothing: what is misplaced, too large or read back is found on one core."""
    overrides, rank, world_size, most_gib = LARGE[name]
    cfg = preset(*overrides)
    report = rehearse(cfg, rank=rank, world_size=world_size, process=rank_process)
    if not cfg.model.moe.num_experts:  # how many tokens an expert has is read back
        check_sound(report)
    assert report.devices == ["cuda:0"]
    assert report.peak_bytes < most_gib * GIB
    shape = derive(cfg, world_size=world_size, tokenizer_vocab_size=dry_run.GPT2_VOCABULARY)
    planned = memory_of_stages(Job.of(cfg, shape))[report.pipeline_rank]
    assert planned.tensors == pytest.approx(report.step_peak_bytes[-1], rel=MOST)
    if name.startswith("175B"):
        # Before the optimizer has its moments, which the first step makes last.
        assert report.step_peak_bytes[0] <= 18.5 * GIB
        # Each micro-batch the embedding's on the first stage and the loss's two on the last one; else one a step, for all
        # gradients that ranks have parts of, where each norm and bias once had its own: 36 a micro-batch.
        own = {0: 1, 15: 2}.get(report.pipeline_rank, 0) * report.num_micro_batches
        summed = {c: n for c, n in calls(report, "tensor").items() if c[0] == "allreduce"}
        assert sum(summed.values()) - own == 1, summed
