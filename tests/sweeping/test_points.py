"""Settings with several values become the points that Hydra's own sweeper makes of them."""

from __future__ import annotations

import pytest

from pipeline.errors import ConfigError
from pipeline.sweeping.points import points_of


def test_points_are_the_product_and_the_last_setting_changes_fastest() -> None:
    """What has one value, a list too, is handed on as it was typed."""
    fixed = ["data.path=a b", "optimizer.lr_scale={}", "training.sample_prompts=[x,y]"]
    points = points_of(["optimizer.lr=1e-3,3e-4", *fixed, "model.num_layers=range(2,7,2)"])
    assert [point.number for point in points] == list(range(6))
    assert [[*point.settings.values()] for point in points[:4]] == [
        ["0.001", "2"], ["0.001", "4"], ["0.001", "6"], ["0.0003", "2"],
    ]  # fmt: skip
    assert points[1].words == [*fixed, "optimizer.lr=0.001", "model.num_layers=4"]
    assert points[1].name == "001-lr=0.001,num_layers=4"


def test_a_glob_goes_over_presets_also_of_ones_own(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "gpt2-mine.yaml").write_text("")
    words = [f"--config-dir={tmp_path}", "model=glob(gpt2-*,exclude=*5*)"]
    points = points_of(words)
    assert [point.settings["model"] for point in points] == ["gpt2-124m", "gpt2-774m", "gpt2-mine"]
    assert points[0].words[0] == f"--config-dir={tmp_path}"


def test_a_name_is_one_of_a_folder() -> None:
    (first, _) = points_of(["data.path=data/a,data/b"])
    assert first.name == "000-path=data_a"


@pytest.mark.parametrize(
    "words, message",
    [
        (["seed=1"], "no setting has several values"),
        (["seed=interval(0,1)"], "has no end of values"),
        (["seed=range(0,2000)"], "at most 1000 points"),
        (["seed=1,,2"], "is not understood"),
        (["seed=1,2", "seed=3,4"], "seed is given twice"),
        (["seed=1,2", "seed=3"], "seed is given twice"),
        (["model=glob(nothing*)"], "fits no value. Known: caption, gpt1-117m"),
    ],
)
def test_what_is_no_sweep_is_said(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        points_of(words)
