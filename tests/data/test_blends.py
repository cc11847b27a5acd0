"""Blends through the loader: they change, datasets come and go, runs end and resume, and nothing is read twice."""

from __future__ import annotations

import pytest

from pipeline.config.data import BlendStage
from pipeline.config.training import RampStage
from pipeline.data.reading_plan import plan_reading
from pipeline.errors import ConfigError, DataError
from tests.support.loading import (
    SEQ_LEN,
    SIZES,
    config,
    consumed,
    loaders,
    read,
    shape_of,
)
from tests.support.token_dataset import counting_shards, write_dataset


def test_a_blend_schedule_changes_shares_and_repeats_nothing(data):
    schedule = [
        BlendStage(start_step=3, weights={"b": 1.0}),
        BlendStage(start_step=5, weights={"a": 0.5, "b": 0.5}),
    ]
    seen, state = read(config(data, blend_schedule=schedule), shape_of(2), 8)
    shares = [len(consumed([step])["a"]) for step in seen]
    assert shares == [pytest.approx(11, abs=1)] * 3 + [0] * 2 + [8] * 3
    for tokens in consumed(seen).values():
        assert len(set(tokens)) == len(tokens)
    assert len(state["segments"]) == 3


@pytest.mark.parametrize("lanes", [1, 4])
def test_blends_that_change_amid_a_ramp_are_the_same_at_layouts_of_3_and_6(data, lanes):
    """A change of weights, of length and of batch, stopped at 3 ranks and resumed at 6."""
    schedule = [
        BlendStage(start_step=2, weights={"b": 1.0}),
        BlendStage(start_step=5, weights={"a": 0.2, "b": 0.8}),
    ]
    cfg = config(data, blend_schedule=schedule, lanes=lanes, window=2)
    ramp = (
        RampStage(until_step=3, global_batch_size=12),
        RampStage(until_step=6, global_batch_size=12, seq_len=8),
    )
    whole, end = read(cfg, shape_of(1, 2, batch=24, ramp=ramp), 9)
    first, state = read(cfg, shape_of(3, 2, batch=24, ramp=ramp), 4)
    second, state = read(cfg, shape_of(6, 1, batch=24, ramp=ramp), 5, state)
    assert first + second == whole
    assert state == end and len(state["segments"]) == 3


def test_new_weights_on_resume_start_a_segment_and_repeat_nothing(data):
    before, state = read(config(data, {"a": 0.9, "b": 0.1}), shape_of(1), 4)
    after, state = read(config(data, {"a": 0.5, "b": 0.5}), shape_of(2), 4, state)
    both = consumed(before + after)
    assert [len(consumed([s])["b"]) for s in after] == [8] * 4
    assert all(len(set(tokens)) == len(tokens) for tokens in both.values())
    assert [segment["start"] for segment in state["segments"]] == [0, 64]


def test_a_dataset_added_and_dropped_on_resume_keeps_the_ledger(data):
    shape, allow = shape_of(1), {"allow_dataset_change": True}
    one, state = read(config(data, {"a": 0.5, "b": 0.5}), shape, 3)
    two, state = read(config(data, {"a": 0.5, "c": 0.5}, **allow), shape, 3, state)
    three, state = read(config(data, {"a": 0.5, "b": 0.5}, **allow), shape, 3, state)
    for name, tokens in consumed(one + two + three).items():
        assert len(set(tokens)) == len(tokens), f"{name} repeats before its epoch ends"
    assert sorted(state["ledger"].values()) == [24, 48, 72]


def test_swapped_data_is_refused_naming_both_and_the_override(data, tmp_path):
    write_dataset(tmp_path / "a", counting_shards([500]))
    _, state = read(config(data, {"a": 1.0}), shape_of(1), 1)
    loader = loaders(config(tmp_path, {"a": 1.0}), shape_of(1))[0]
    old, new = (next(iter(s["datasets"]))[:12] for s in (state, loader.state()))
    with pytest.raises(
        DataError,
        match=f"{old}.*not in the config.*{new}.*not in the checkpoint.*allow_dataset_change",
    ):
        loader.restore(state)


def test_allowed_changes_are_said_once_and_not_by_every_rank(data, caplog):
    """By the plan, which the main rank prints; a thousand ranks that restore say nothing."""
    _, state = read(config(data, {"a": 1.0}), shape_of(1), 1)
    cfg = config(data, {"b": 1.0}, allow_dataset_change=True)
    (loader,) = loaders(cfg, shape_of(1))
    plan = plan_reading(
        cfg,
        loader.sampler.datasets,
        shape=shape_of(1),
        seed=loader.sampler.facts["seed"],
        saved=state,
    )
    loader.restore(state)
    said = [*plan.warnings(), *(record.getMessage() for record in caplog.records)]
    gone, new = [text for text in said if "resuming with changed data" in text]
    assert "dataset a" in gone and "not in the config" in gone
    assert "dataset b" in new and "not in the checkpoint" in new


@pytest.mark.parametrize("change", [{"lanes": 2}, {"window": 3}, "seed"])
def test_another_order_on_resume_is_refused_or_begins_the_next_epoch(data, change):
    settings, seed = ({}, 4) if change == "seed" else (change, 3)
    _, state = read(config(data, {"a": 1.0}), shape_of(1), 2)
    with pytest.raises(DataError, match="the checkpoint has .*data.allow_dataset_change=true"):
        loaders(config(data, {"a": 1.0}, **settings), shape_of(1), state, seed=seed)
    allowed = loaders(
        config(data, {"a": 1.0}, allow_dataset_change=True, **settings),
        shape_of(1),
        state,
        seed=seed,
    )[0]
    assert list(allowed.state()["ledger"].values()) == [95]
    assert (allowed.state()["step"], allowed.state()["samples_seen"]) == (2, 32)


def test_max_epochs_ends_a_dataset_and_then_the_run_with_a_clear_error(data):
    cfg = config(data, {"a": 0.5, "tiny": 0.5})
    cfg.train[1].max_epochs = 2
    seen, _ = read(cfg, shape_of(1), 3)
    assert len(consumed(seen)["a"]) == 48  # tokens of tiny lie in the same range: two of them
    cfg.train[0].max_epochs = 1
    loader = loaders(cfg, shape_of(1))[0]
    with pytest.raises(DataError, match="used up at sample 97"):
        for _ in range(10):
            loader.next_step()


def test_temperature_flattens_the_blend_and_sizes_are_the_default(data):
    sizes = {"a": None, "tiny": None}
    plain, flat = (
        loaders(config(data, sizes, temperature=t), shape_of(1))[0].state() for t in (1.0, 2.0)
    )
    names = {v["name"]: k for k, v in plain["datasets"].items()}
    ratio = sum(SIZES) / (SEQ_LEN + 1)
    weights = [s["segments"][0]["weights"] for s in (plain, flat)]
    assert weights[0][names["a"]] / weights[0][names["tiny"]] == pytest.approx(ratio)
    assert weights[1][names["a"]] / weights[1][names["tiny"]] == pytest.approx(ratio**0.5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weights": {"a": 1.0, "b": None}}, "give every dataset a weight, or none; b has none"),
        ({"weights": {"a": 0.0}}, "not all 0"),
        ({"lanes": 0}, r"data.lanes \(0\) must be at least 1"),
        ({"temperature": 0.0}, r"data.temperature \(0.0\) must be above 0"),
        (
            {"blend_schedule": [BlendStage(start_step=5, weights={"x": 1.0})]},
            "names x; the datasets are a, b",
        ),
        (
            {"blend_schedule": [BlendStage(start_step=0, weights={"a": 1.0})]},
            r"start_step \(0\) must be above 0",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(data, settings, said):
    with pytest.raises(ConfigError, match=said):
        loaders(config(data, **settings), shape_of(1))
