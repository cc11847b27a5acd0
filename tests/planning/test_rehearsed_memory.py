"""The plan's memory against what a rank of the real engine holds on a device that computes nothing.

One rank of each kind: without a pipeline at ZeRO-1 and -2, and the first, a middle and the last stage of one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import derive
from pipeline.planning.job import Job
from pipeline.planning.memory import memory_of_stages
from pipeline.rehearsal import fake_cuda
from pipeline.rehearsal.dry_run import rehearse

pytestmark = pytest.mark.skipif(fake_cuda.compiler() is None, reason="no C++ compiler")
FILES = (cli.CONF_DIR / "model").glob("*.yaml")
PRESETS = sorted(path.stem for path in FILES if "moe:" not in path.read_text())
# Ranks along the pipeline, the stage that is looked at, the ZeRO stage.
KINDS = {
    "zero 1": (1, 0, 1),
    "zero 2": (1, 0, 2),
    "first": (3, 0, 1),
    "middle": (3, 1, 1),
    "last": (3, 2, 1),
}


def error(model: str, kind: str, recompute: str, *settings: str) -> float:
    """By how much the plan is above the rehearsed peak, 0.01 is 1 %."""
    pipeline, stage, zero = KINDS[kind]
    tensor = 8 if model == "gpt3-175b" else 1
    if model == "tiny":  # four blocks, and a head as heavy as 42
        pipeline, stage = min(pipeline, 2), min(stage, 1)
    words = [
        "data.path=none", f"model={model}", f"training.recompute={recompute}",
        f"parallel.zero_stage={zero}", f"parallel.pipeline_parallel_size={pipeline}",
        f"parallel.tensor_parallel_size={tensor}", f"parallel.sequence_parallel={tensor > 1}",
        "training.micro_batch_size=2", f"training.global_batch_size={8 * pipeline}", *settings,
    ]  # fmt: skip
    cfg = cli.compose(PretrainConfig, words, config="pretrain")
    vocab_size = cfg.model.vocab_size or 50257
    world_size = 2 * pipeline * tensor
    shape = derive(cfg, world_size=world_size, tokenizer_vocab_size=vocab_size)
    rank = stage * 2 * tensor
    report = rehearse(
        cfg,
        rank=rank,
        world_size=world_size,
        tokenizer_vocab_size=vocab_size,
        num_micro_batches=max(2, pipeline),
    )
    assert report.pipeline_rank == stage
    planned = memory_of_stages(Job.of(cfg, shape))[stage]
    return planned.tensors / report.step_peak_bytes[-1] - 1


@pytest.mark.parametrize(
    ("model", "kind", "recompute"),
    [("modern-125m", "middle", "full"), ("gpt2-124m", "zero 2", "none")],
)
def test_the_plan_is_within_5_percent_of_a_rehearsed_rank(model, kind, recompute):
    assert abs(error(model, kind, recompute, "model.num_layers=3")) < 0.05


def test_presets_of_all_kinds_are_here():
    assert len(PRESETS) == 18
    gated = [
        p for p in PRESETS if "swiglu" in (Path(cli.CONF_DIR) / "model" / f"{p}.yaml").read_text()
    ]
    assert (
        len(gated) == 4
        and yaml.safe_load((cli.CONF_DIR / "model/tiny.yaml").read_text())["num_layers"] == 4
    )


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("model", PRESETS)
def test_every_dense_preset_is_within_5_percent(model, recompute):
    """An engineer rents by this number: too low ends in out of memory, too high in devices that idle."""
    errors = {kind: error(model, kind, recompute) for kind in KINDS}
    assert {kind: f"{e:+.1%}" for kind, e in errors.items() if abs(e) >= 0.05} == {}
