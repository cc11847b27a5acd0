"""Derived numbers and the rules between settings, each with the message a person reads."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.choices import Decay, OptimizerName, PipelineSchedule, Precision
from pipeline.config.data import DataConfig
from pipeline.config.evaluation import Evaluation
from pipeline.config.model import MoeConfig
from pipeline.config.operation import TrackingConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import ForwardShape, derive, derive_evaluation
from pipeline.config.training import (
    OptimizerConfig,
    ParallelConfig,
    RampStage,
    ScheduleConfig,
    TrainingConfig,
)
from pipeline.errors import ConfigError
from tests.support.layouts import config


def shape_of(cfg: PretrainConfig, world_size: int = 1) -> Any:
    return derive(cfg, world_size=world_size, tokenizer_vocab_size=250)


def test_sizes_follow_from_config_and_world_size() -> None:
    shape = shape_of(config(tp=2, pp=2), world_size=8)
    assert (shape.sizes.data, shape.at(0).num_micro_batches, shape.at(0).tokens) == (
        2,
        4,
        16 * 32,
    )
    assert (shape.vocab_size, shape.padded_vocab_size) == (250, 256)
    assert (shape.total_steps, shape.total_tokens) == (10, 10 * 16 * 32)


def test_token_budget_is_rounded_up_to_whole_steps() -> None:
    cfg = replace(
        config(),
        training=TrainingConfig(
            total_tokens=1000.0, global_batch_size=16, precision=Precision.fp32
        ),
    )
    assert shape_of(cfg).total_steps == 2  # 512 tokens a step
    assert shape_of(cfg).total_tokens == 1024


def test_ramp_shapes_each_step_and_counts_toward_the_budget() -> None:
    training = TrainingConfig(
        total_tokens=4 * 8 * 16 + 2 * 16 * 32, global_batch_size=16, precision=Precision.fp32,
        ramp=[RampStage(until_step=4, global_batch_size=8, seq_len=16)],
    )  # fmt: skip
    shape = shape_of(replace(config(), training=training))
    first, last = shape.at(3), shape.at(4)
    assert (first.global_batch_size, first.seq_len, first.num_samples, first.tokens) == (
        8,
        16,
        4,
        128,
    )
    assert (last.global_batch_size, last.seq_len, last.num_samples) == (16, 32, 16)
    assert shape.total_steps == 6


@pytest.mark.parametrize(
    "length, steps",
    [
        ({"total_steps": 20}, 2),
        ({"total_steps": 5}, 0),
        ({"total_steps": 999}, 99),
        ({"total_steps": 5000}, 100),
        ({"total_tokens": 40.0 * 512 * 32}, 4),
    ],
)
def test_a_warm_up_that_nobody_set_bends_to_a_short_run(length: dict[str, Any], steps: int) -> None:
    """`training.total_steps=20` is everybody's first command; a preset's 100 steps refused it."""
    training = TrainingConfig(**length, global_batch_size=512, precision=Precision.fp32)
    cfg = replace(config(), training=training, schedule=ScheduleConfig(min_lr=1e-4))
    assert shape_of(cfg).warmup_steps == steps


CASES: list[tuple[str, dict[str, Any], int, str]] = [
    ("heads by tensor parallel", {"parallel": ParallelConfig(tensor_parallel_size=3)}, 3, r"num_attention_heads \(4\).*tensor_parallel_size \(3\).*fits this model: 2"),
    ("layers by stages", {"parallel": ParallelConfig(pipeline_parallel_size=8)}, 8, r"num_layers \(4\).*stages \(8\).*fits: 4"),
    ("world size", {"parallel": ParallelConfig(tensor_parallel_size=2)}, 3, r"ranks \(3\) must be a multiple.*Start 4 ranks"),
    ("global batch", {"training": TrainingConfig(total_steps=1, global_batch_size=10, micro_batch_size=4)}, 1, r"global_batch_size \(10\).*Set training.global_batch_size=12"),
    ("zero with pipeline", {"parallel": ParallelConfig(pipeline_parallel_size=2, zero_stage=3)}, 2, r"zero_stage=3 does not work with parallel.pipeline_parallel_size=2"),
    ("zero 0 in bf16", {"parallel": ParallelConfig(zero_stage=0), "training": TrainingConfig(total_steps=1)}, 1, r"zero_stage=0 works with training.precision=fp32 only"),
    ("sequence parallel alone", {"parallel": ParallelConfig(sequence_parallel=True)}, 1, r"sequence_parallel=true has no effect"),
    ("dualpipev micro-batches", {"parallel": ParallelConfig(pipeline_parallel_size=2, pipeline_schedule=PipelineSchedule["dualpipev"]), "training": TrainingConfig(total_steps=1, global_batch_size=2, precision=Precision.fp32)}, 2, r"dualpipev needs at least 4 micro-batches.*global_batch_size=4"),
    ("no length", {"training": TrainingConfig()}, 1, r"exactly one of training.total_steps \(None\) and training.total_tokens \(None\)"),
    ("sequence too long", {"training": TrainingConfig(total_steps=1, seq_len=64)}, 1, r"seq_len \(64\) must not exceed model.max_seq_len \(32\)"),
    ("warm-up too long", {"schedule": ScheduleConfig(warmup_steps=11, min_lr=1e-4)}, 1, r"warmup_steps \(11\) must not exceed the run's 10 steps. Set schedule.warmup_steps=null"),
    ("warm-up twice", {"schedule": ScheduleConfig(warmup_steps=1, warmup_tokens=99, min_lr=1e-4)}, 1, r"both set. Set one of them null"),
    ("descent too long", {"schedule": ScheduleConfig(decay=Decay.wsd, warmup_steps=2, decay_steps=9, min_lr=1e-4)}, 1, r"Set schedule.decay_steps=8 or less, or null"),
    ("two lengths", {"training": TrainingConfig(total_steps=10, total_tokens=1e9, precision=Precision.fp32)}, 1, r"Add training.total_steps=null, and the tokens count"),
    ("min_lr above lr", {"schedule": ScheduleConfig(min_lr=1.0)}, 1, r"min_lr \(1.0\) must not exceed optimizer.lr.*Set schedule.min_lr="),
    ("uneven split of a sequence", {"parallel": ParallelConfig(tensor_parallel_size=4, sequence_parallel=True), "training": TrainingConfig(total_steps=1, seq_len=30, precision=Precision.fp32)}, 4, r"training.seq_len \(30\) must be a multiple of parallel.tensor_parallel_size \(4\).*Set training.seq_len=32"),
    ("sequence over context ranks", {"parallel": ParallelConfig(tensor_parallel_size=2, sequence_parallel=True, context_parallel_size=2), "training": TrainingConfig(total_steps=1, seq_len=30, precision=Precision.fp32)}, 4, r"training.seq_len \(30\) must be a multiple of parallel.context_parallel_size \* parallel.tensor_parallel_size \(4\).*Set training.seq_len=32"),
    ("ramp over context ranks", {"parallel": ParallelConfig(context_parallel_size=4), "training": TrainingConfig(total_steps=9, seq_len=32, ramp=[RampStage(4, None, 2)], precision=Precision.fp32)}, 4, r"training.ramp\[0\].seq_len \(2\) must be a multiple of parallel.context_parallel_size \(4\). Set training.ramp\[0\].seq_len=4"),
    ("heads over context ranks", {"parallel": ParallelConfig(tensor_parallel_size=2, context_parallel_size=4)}, 8, r"\(4 / 2 = 2\) must be a multiple of parallel.context_parallel_size \(4\).*fits this model: 2"),
    ("heads looked at under context parallel", {"parallel": ParallelConfig(context_parallel_size=2), "training": TrainingConfig(total_steps=9, probe_every=3, precision=Precision.fp32)}, 2, r"training.probe_every \(3\) needs parallel.context_parallel_size=1"),
    ("no context ranks", {"parallel": ParallelConfig(context_parallel_size=0)}, 1, r"^parallel.context_parallel_size \(0\) must be at least 1.$"),
    ("world size with context ranks", {"parallel": ParallelConfig(context_parallel_size=2, pipeline_parallel_size=2)}, 6, r"ranks \(6\) must be a multiple of .*\(1 \* 2 \* 2 = 4\). Start 8 ranks"),
    ("global batch counts parts of the batch", {"parallel": ParallelConfig(context_parallel_size=2), "training": TrainingConfig(total_steps=1, global_batch_size=6, micro_batch_size=4)}, 4, r"micro_batch_size \* data_parallel_size \(4 \* 2 = 8\)"),
    ("traced steps after the end", {"training": TrainingConfig(total_steps=10, profile_steps=[9, 11], precision=Precision.fp32)}, 1, r"profile_steps \(\[9, 11\]\) must be a first and a last step.*total_steps \(10\)"),
    ("one traced step", {"training": TrainingConfig(total_steps=10, profile_steps=[3], precision=Precision.fp32)}, 1, r"profile_steps \(\[3\]\).*e.g. \[10,12\]"),
    ("positions without masks", {"data": DataConfig(reset_positions=True)}, 1, r"reset_positions=true needs data.mask_documents=true"),
]  # fmt: skip


@pytest.mark.parametrize(
    "what, change, world_size, message", CASES, ids=[case[0] for case in CASES]
)
def test_impossible_runs_are_refused_with_the_way_out(
    what: str, change: dict[str, Any], world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        shape_of(replace(config(), **change), world_size)


def test_vocabulary_smaller_than_the_tokenizer_is_refused() -> None:
    cfg = config()
    with pytest.raises(
        ConfigError, match=r"vocab_size \(100\) is smaller than the datasets' tokenizer \(250 ids\)"
    ):
        shape_of(replace(cfg, model=replace(cfg.model, vocab_size=100)))


def test_more_experts_a_token_than_experts_is_refused() -> None:
    cfg = config("modern")
    with pytest.raises(
        ConfigError, match=r"top_k \(4\) must be between 1 and model.moe.num_experts \(2\)"
    ):
        shape_of(replace(cfg, model=replace(cfg.model, moe=MoeConfig(num_experts=2, top_k=4))))


def test_experts_under_tensor_parallelism_need_sequence_parallelism() -> None:
    with pytest.raises(ConfigError, match="need parallel.sequence_parallel=true"):
        shape_of(config("moe", tp=2), 2)


SPREAD: list[tuple[str, PretrainConfig, int, str]] = [
    ("no experts", config("modern", ep=2), 2, r"expert_parallel_size \(2\) shares out experts; model.moe.num_experts is 0"),
    ("more than experts", config("moe", ep=8), 8, r"\(8\) must be 1, or .*num_experts \(4\).*Legal here: 1, 2, 4"),
    ("more than ranks", config("moe", ep=4), 2, r"context_parallel_size \* data_parallel_size = 2\)\. Legal here: 1, 2\."),
    ("ranks of other stages", config("moe", ep=4, pp=2), 4, r"= 2\)\. Legal here: 1, 2\."),
    ("part of a tensor-parallel group", config("moe", ep=2, tp=4, sp=True), 4, r"multiple of parallel.tensor_parallel_size \(4\).*Legal here: 1, 4\."),
    ("weights partitioned", config("moe", ep=4, tp=2, sp=True, zero=3), 4, r"zero_stage=3 works with .* \(4\) up to .*\(2\).*Set parallel.zero_stage=2"),
    ("on the host", config("moe", ep=2, offload=True), 2, r"offload_optimizer=true needs parallel.expert_parallel_size=1"),
    ("Muon", replace(config("moe", ep=2), optimizer=OptimizerConfig(name=OptimizerName.muon)), 2, r"muon does not work with parallel.expert_parallel_size \(2\)"),
    ("nobody", config("moe", ep=0), 1, r"^parallel.expert_parallel_size \(0\) must be at least 1\.$"),
]  # fmt: skip


@pytest.mark.parametrize(
    "cfg, world_size, message", [case[1:] for case in SPREAD], ids=[case[0] for case in SPREAD]
)
def test_experts_that_fit_no_ranks_are_refused(
    cfg: PretrainConfig, world_size: int, message: str
) -> None:
    """Before processes form: megatron-core's assertion names no setting, DeepSpeed's comes after the model is built."""
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        shape_of(cfg, world_size)


def test_experts_spread_over_tensor_and_data_ranks() -> None:
    for cfg, world_size in (
        (config("moe", ep=4, tp=2, sp=True, zero=2), 4),
        (config("moe", ep=2, tp=2, sp=True, zero=3), 8),
        (config("moe", ep=4, cp=2), 4),
    ):
        assert shape_of(cfg, world_size).sizes.expert == cfg.parallel.expert_parallel_size


def test_experts_on_ranks_of_their_own_are_not_cut_and_a_shared_one_is() -> None:
    """The one was refused though it trains; the other was let through to megatron-core's assertion."""
    alone, cut = config("moe", tp=2, sp=True, ep=2), config("moe", tp=2, sp=True)
    odd, shared = (
        MoeConfig(num_experts=4, ffn_hidden_size=95),
        MoeConfig(num_experts=4, shared_expert_ffn_hidden_size=33),
    )
    assert shape_of(replace(alone, model=replace(alone.model, moe=odd)), 2).sizes.expert == 2
    with pytest.raises(ConfigError, match=r"model.ffn_hidden_size \(95\) must be divisible"):
        shape_of(replace(cut, model=replace(cut.model, moe=odd)), 2)
    for cfg in (alone, cut):
        with pytest.raises(ConfigError, match=r"shared_expert_ffn_hidden_size \(33\) must be"):
            shape_of(replace(cfg, model=replace(cfg.model, moe=shared)), 2)


def test_every_broken_rule_is_named_at_once() -> None:
    """One start, one list: five starts for five mistakes cost an hour in a queue."""
    cfg = replace(
        config(),
        model=replace(config().model, hidden_size=65),
        schedule=ScheduleConfig(min_lr=1.0),
        parallel=ParallelConfig(zero_stage=4),
    )
    with pytest.raises(ConfigError) as caught:
        shape_of(cfg)
    lines = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in lines] == [
        "model.hidden_size", "parallel.zero_stage", "schedule.min_lr",
    ]  # fmt: skip


BROKEN_NUMBERS: list[dict[str, Any]] = [
    {"model": replace(config().model, num_attention_heads=0)},
    {"model": replace(config().model, num_query_groups=0)},
    {"model": replace(config().model, ffn_hidden_size=-1)},
    {"parallel": ParallelConfig(tensor_parallel_size=0)},
    {"parallel": ParallelConfig(pipeline_parallel_size=-2)},
    {"training": TrainingConfig(total_steps=9, micro_batch_size=0, precision=Precision.fp32)},
    {"training": TrainingConfig(total_steps=0, precision=Precision.fp32)},
    {"training": TrainingConfig(total_tokens=float("nan"), precision=Precision.fp32)},
    {"training": TrainingConfig(total_steps=9, seq_len=0, precision=Precision.fp32)},
    {"training": replace(config().training, ramp=[RampStage(until_step=5, seq_len=0)])},
    {"schedule": ScheduleConfig(decay_steps=0, min_lr=1e-4)},
]


@pytest.mark.parametrize("change", BROKEN_NUMBERS, ids=range(len(BROKEN_NUMBERS)))
def test_a_broken_number_is_named_alone_and_breaks_no_rule(change: dict[str, Any]) -> None:
    """Rules that would divide by it are left out: no ZeroDivisionError, no consequence as a cause."""
    with pytest.raises(ConfigError, match=r"must be at least [01]\.$") as caught:
        shape_of(replace(config(), **change))
    assert "\n" not in str(caught.value)


def test_what_does_not_depend_on_a_broken_number_is_still_judged() -> None:
    cfg = replace(
        config("modern", tp=3),
        training=TrainingConfig(total_steps=10, micro_batch_size=0, precision=Precision.fp32),
        schedule=ScheduleConfig(warmup_steps=11, min_lr=1e-4),
    )
    with pytest.raises(ConfigError) as caught:
        shape_of(cfg, 4)
    for words in ("micro_batch_size (0)", "num_query_groups (2)", "ranks (4)", "warmup_steps (11)"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", " ", "..", "a/b", "/abs", "${foo}", "a\\b", "a\tb", "a\x1b[2J", "a\u2028b"]
)
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    """The run lives in <runs_dir>/<name>: "" and ".." would write into other runs."""
    with pytest.raises(ConfigError, match="must be the name of one folder"):
        shape_of(replace(config(), name=name))


def test_a_name_is_as_long_as_a_folders(tmp_path: Path) -> None:
    """It ended in `OSError: File name too long`."""
    (tmp_path / ("ü" * 127)).mkdir()
    shape_of(replace(config(), name="ü" * 127))
    with pytest.raises(ConfigError, match="has 256 bytes; a folder's name has at most 255"):
        shape_of(replace(config(), name="ü" * 128))


def test_a_tracker_that_is_not_installed_is_refused_before_ranks_form(monkeypatch) -> None:
    """Its thread would warn for ever, and nobody would have the curves."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    shape_of(config())
    wanted = replace(config(), tracking=TrackingConfig(tensorboard=True))
    with pytest.raises(ConfigError, match=r'pip install -e "\.\[tensorboard\]"'):
        shape_of(wanted)


# ---- evaluation ----------------------------------------------------------------------------------


def asked(preset: str = "gpt2", *, tp: int = 1, pp: int = 1, **changes: Any) -> Evaluation:
    """A checkpoint's model on held-out data."""
    cfg = config(preset, tp=tp, pp=pp)
    evaluation = Evaluation(
        cfg.model,
        cfg.data,
        cfg.parallel,
        Precision.bf16,
        seq_len=32,
        micro_batch_size=3,
        sequences=0,
    )
    return replace(evaluation, **changes)


def shape_asked(evaluation: Evaluation, world_size: int = 1) -> ForwardShape:
    return derive_evaluation(evaluation, world_size=world_size, tokenizer_vocab_size=250)


def test_an_evaluation_has_the_sizes_and_the_vocabulary_of_a_run_at_its_layout() -> None:
    """Checkpoints are read into embeddings of one padding, whoever reads them."""
    run = shape_of(config(tp=2, pp=2), world_size=8)
    found = shape_asked(asked(tp=2, pp=2), world_size=8)
    assert (found.sizes, found.vocab_size, found.padded_vocab_size) == (
        run.sizes, run.vocab_size, run.padded_vocab_size,
    )  # fmt: skip
    assert (found.seq_len, found.micro_batch_size) == (32, 3)


ASKED_IN_VAIN: list[tuple[str, Evaluation, int, str]] = [
    ("heads by tensor parallel", asked(tp=3), 3, r"num_attention_heads \(4\) must be divisible"),
    ("layers by stages", asked(pp=8), 8, r"num_layers \(4\).*fits: 4"),
    ("world size", asked(tp=2), 3, r"ranks \(3\) must be a multiple.*Start 4 ranks"),
    ("sequence too long", asked(seq_len=64), 1, r"^seq_len \(64\) must not exceed.*Set seq_len=32"),
    ("no sequence", asked(seq_len=0), 1, r"^seq_len \(0\) must be at least 1\.$"),
    ("micro-batch", asked(micro_batch_size=0), 1, r"^micro_batch_size \(0\) must be at least 1\.$"),
    ("sequences", asked(sequences=-1), 1, r"^sequences \(-1\) must be at least 0\.$"),
    ("experts", asked("moe", tp=2), 2, r"need parallel.sequence_parallel=true"),
    ("spread experts", asked("moe", parallel=ParallelConfig(expert_parallel_size=3)), 3, r"expert_parallel_size \(3\) must be 1, or"),
    ("uneven split", asked(tp=2, seq_len=31, parallel=ParallelConfig(tensor_parallel_size=2, sequence_parallel=True)), 2, r"^seq_len \(31\) must be a multiple.*Set seq_len=32"),
    ("positions", asked(data=DataConfig(reset_positions=True)), 1, r"needs data.mask_documents=true"),
    ("vocabulary", asked(model=replace(config().model, vocab_size=100)), 1, r"vocab_size \(100\) is smaller"),
]  # fmt: skip


@pytest.mark.parametrize(
    "evaluation, world_size, message",
    [case[1:] for case in ASKED_IN_VAIN],
    ids=[case[0] for case in ASKED_IN_VAIN],
)
def test_an_impossible_evaluation_is_refused_in_the_words_of_its_own_settings(
    evaluation: Evaluation, world_size: int, message: str
) -> None:
    """The rules are a run's; what is told to be set is what the command knows."""
    with pytest.raises(ConfigError, match=f"(?s){message}") as caught:
        shape_asked(evaluation, world_size)
    assert "training." not in str(caught.value)


def test_packed_rows_are_asked_row_by_row() -> None:
    """In evaluation too: a window across rows would score one dialogue after the end of another."""
    with pytest.raises(ConfigError, match=r"rows of 16 tokens, and seq_len is 32. Set seq_len=16"):
        derive_evaluation(asked(), world_size=1, tokenizer_vocab_size=250, row_tokens=16)


def test_an_evaluation_obeys_no_rule_of_training() -> None:
    """Nothing runs backwards: a run's layout serves, whatever it says of ZeRO and schedules."""
    dual = PipelineSchedule["dualpipev"]
    parallel = ParallelConfig(pipeline_parallel_size=4, zero_stage=3, pipeline_schedule=dual)
    assert shape_asked(asked(parallel=parallel), 4).sizes.pipeline == 4
    assert shape_asked(asked(micro_batch_size=7), 3).sizes.data == 3
