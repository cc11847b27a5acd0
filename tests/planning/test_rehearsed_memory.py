"""The plan's memory against rehearsed ranks: a slice of the whole, which is a command (tests/rehearsed_presets.py)."""

from __future__ import annotations

import contextlib

import pytest

from pipeline import cli
from pipeline.rehearsal import fake_cuda
from tests import rehearsed_presets
from tests.rehearsed_presets import KINDS, MOST, PRESETS, RECOMPUTE, cases, error, slice_of_cases

pytestmark = pytest.mark.skipif(fake_cuda.compiler() is None, reason="no C++ compiler")


@pytest.mark.parametrize(
    ("model", "kind", "recompute"),
    [("modern-125m", "middle", "full"), ("gpt2-124m", "zero 2", "none")],
)
def test_the_plan_is_within_5_percent_of_a_rehearsed_rank(rank_process, model, kind, recompute):
    assert abs(error(model, kind, recompute, "model.num_layers=3", process=rank_process)) < MOST


def test_presets_of_all_kinds_are_here():
    assert len(PRESETS) == 18 and len(cases()) == 180
    texts = {preset: (cli.CONF_DIR / f"model/{preset}.yaml").read_text() for preset in PRESETS}
    assert sum("swiglu" in text for text in texts.values()) == 4
    assert "num_layers: 4\n" in texts["tiny"]


def test_the_slice_has_every_preset_and_every_kind_of_rank():
    chosen = slice_of_cases()
    assert [model for model, _, _ in chosen] == PRESETS
    assert {case[1:] for case in chosen} == {(k, r) for k in KINDS for r in RECOMPUTE}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "kind", "recompute"), slice_of_cases())
def test_every_dense_preset_is_within_5_percent(rank_process, model, kind, recompute):
    """An engineer rents by this number: too low ends in out of memory, too high in devices that idle."""
    assert abs(error(model, kind, recompute, process=rank_process)) < MOST


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["middle", "last"])
def test_gathered_gradients_that_wait_for_late_products_are_planned(rank_process, kind):
    """Of 8 tensor-parallel ranks with sequence parallelism: 3.8 % of the whole with four blocks a stage, 5.3 % with 32."""
    found = error("gpt3-175b", kind, "none", "model.num_layers=12", process=rank_process)
    assert abs(found) < 0.015


@pytest.mark.slow
def test_fp32_sums_gradients_in_place_without_buckets(rank_process):
    """ZeRO-1 (engine/deepspeed/fp32_sums.py): DeepSpeed's two buckets were 0.3 GiB more."""
    words = ["model.num_layers=3", "training.precision=fp32"]
    found = error("gpt2-124m", "zero 1", "none", *words, process=rank_process)
    assert abs(found) < 0.005


ENCODER = [
    "model.vision.num_attention_heads=12", "model.vision.image_size=224", "model.vision.patch_size=16",
    "model.max_seq_len=1024", "training.seq_len=1024",
]  # fmt: skip


@pytest.mark.slow
def test_a_first_stage_with_pictures_is_within_5_percent(rank_process):
    """The encoder's activations are gone when the word embedding's gradient is there: 7.7 % less, here."""
    settings = [*ENCODER, "model.num_layers=6", "model.vision.num_layers=4"]
    assert abs(error("modern-125m", "first", "none", *settings, process=rank_process)) < MOST


def test_the_command_says_what_is_off(monkeypatch, capsys):
    errors = iter([0.01, -0.02, 0.0, 0.049, 0.06, 0.0, 0.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(rehearsed_presets, "error", lambda *_, **__: next(errors))
    monkeypatch.setattr(rehearsed_presets, "RankProcess", contextlib.nullcontext)
    assert rehearsed_presets.main(["--models", "tiny", "--processes", "1"]) == 1
    out = capsys.readouterr().out
    assert " +6.00%  tiny, first, recompute none\n" in out
    assert "10 comparisons, -2.00% to +6.00%; 1 off by 5% or more" in out
    with pytest.raises(SystemExit):
        rehearsed_presets.main(["--models", "tinny"])
    assert "no such preset: tinny" in capsys.readouterr().err
