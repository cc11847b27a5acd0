"""Every yaml under conf/ composes, and the layouts that recipes ask for exist."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import derive

GROUPS = [
    "data",
    "experiment",
    "model",
    "optimizer",
    "parallel",
    "schedule",
    "tracking",
]  # of pretrain.yaml
OPTIONS = [path for group in GROUPS for path in sorted((cli.CONF_DIR / group).glob("*.yaml"))]
RECIPES = [path for path in OPTIONS if path.parent.name == "experiment"]
SECTIONS = [path for path in OPTIONS if path.parent.name != "experiment"]
# Devices each recipe names in its comment.
RECIPE_WORLD_SIZE = {
    "quickstart": 1,
    "talk": 1,
    "translate": 1,
    "your-text": 1,
    "chars": 1,
    "caption": 1,
    "gpt2-124m": 8,
    "modern-1.3b": 8,
    "pictures-1.3b": 64,
    "modern-7b-128k": 64,
    "gpt3-6.7b": 64,
    "gpt3-175b": 1024,
}


def compose(*overrides: str) -> PretrainConfig:
    return cli.compose(PretrainConfig, overrides, config="pretrain")


@pytest.mark.parametrize("path", SECTIONS, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_option_composes_and_sets_what_it_says(path):
    """A key that the schema does not know, or that is overridden on the way, would be a silent lie."""
    cfg = compose(f"{path.parent.name}={path.stem}")
    section = getattr(cfg, path.parent.name)
    for key, value in yaml.safe_load(path.read_text()).items():
        if key == "defaults" or "${" in str(value):
            continue
        found = getattr(section, key)
        if isinstance(value, dict) and dataclasses.is_dataclass(found):
            found = {name: getattr(found, name) for name in value}
        follows = value is None and found == []  # data.validation, from data.path
        assert follows or getattr(found, "name", found) == value


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_derives_a_run_on_the_devices_it_names(path):
    """A recipe must pass every rule between settings, at the size it was written for."""
    cfg = compose(f"experiment={path.stem}")
    shape = derive(cfg, world_size=RECIPE_WORLD_SIZE[path.stem], tokenizer_vocab_size=4096)
    assert shape.total_steps > shape.warmup_steps


def test_model_presets_are_named_as_their_files():
    """`name` defaults to the model's, so a wrong one would mix two runs in one folder."""
    for path in OPTIONS:
        if path.parent.name == "model":
            assert yaml.safe_load(path.read_text())["name"] == path.stem


def test_all_published_sizes_are_there():
    """The presets the README promises."""
    expected = {"gpt1-117m", *(f"gpt2-{s}" for s in ("124m", "355m", "774m", "1558m")), "tiny"}
    expected |= {
        f"gpt3-{s}" for s in ("125m", "350m", "760m", "1.3b", "2.7b", "6.7b", "13b", "175b")
    }
    expected |= {f"modern-{s}" for s in ("125m", "350m", "1.3b", "7b")}
    expected |= {"mixtral-8x7b", "qwen3-moe-30b", "caption"}
    assert {path.stem for path in OPTIONS if path.parent.name == "model"} == expected


def test_data_path_gives_both_splits():
    """One setting names what tokenize wrote."""
    data = compose("data.path=corpus").data
    assert [d.path for d in data.train + data.validation] == ["corpus/train", "corpus/validation"]


def test_there_is_no_default_data():
    """A run on data that nobody named is a run on the wrong data."""
    data = compose().data
    assert (data.path, data.train, data.validation) == (None, [], [])


def test_a_mixture_alone_has_no_validation_set():
    """The example of conf/data/default.yaml; it asked for a folder that nobody named."""
    data = compose("data.train=[{path: a/train, weight: 0.7}, {path: b/train, weight: 0.3}]").data
    assert [d.path for d in data.train] == ["a/train", "b/train"] and data.validation == []


def test_what_is_listed_wins_over_the_splits_of_data_path():
    data = compose("data.path=corpus", "data.validation=[]").data
    assert ([d.path for d in data.train], data.validation) == (["corpus/train"], [])
    data = compose("data.path=corpus", "data.train=[{path: a}]").data
    assert [d.path for d in data.train + data.validation] == ["a", "corpus/validation"]


def test_shown_config_composes_to_itself(tmp_path):
    """`--cfg` and the run folder's config.yaml are the config, not an impression of it."""
    cfg = compose("model=modern-7b", "parallel=tp8-pp8")
    shown = yaml.safe_load(cli.to_yaml(cfg))
    assert shown["model"]["position"] == "rope"
    assert set(shown) == {field.name for field in dataclasses.fields(PretrainConfig)}
    assert shown["parallel"]["pipeline_schedule"] == "1f1b"


def test_every_yaml_starts_with_a_comment_that_says_what_it_is():
    """--help lists names only; the file is where a user reads on."""
    for path in [*OPTIONS, Path(cli.CONF_DIR / "pretrain.yaml")]:
        assert path.read_text().startswith("# "), path
