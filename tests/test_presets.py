"""Presets of one's own: beside the run, or in a named folder; never instead of ours without a word."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra import initialize
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from pipeline import cli, presets
from pipeline.config.pretrain import PretrainConfig
from pipeline.errors import ConfigError
from pipeline.sweep import SweepConfig

MINE = """# @package _global_
defaults:
  - override /model: my-model

training:
  total_steps: 77
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory outside the clone, with a recipe and a model in its conf/."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("experiment/mine", MINE), ("model/my-model", "name: my-model\nnum_layers: 3\nhidden_size: 64\nnum_attention_heads: 2\n")):  # fmt: skip
        path = tmp_path / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return tmp_path


def compose(*words: str) -> PretrainConfig:
    return cli.compose(PretrainConfig, words, config="pretrain")


def test_a_recipe_in_the_working_directory_is_one_of_ours(folder: Path) -> None:
    """An installation is not the place for a user's files."""
    cfg = compose("experiment=mine")
    assert (cfg.training.total_steps, cfg.model.num_layers, cfg.name) == (77, 3, "my-model")
    assert compose("model=tiny").model.num_layers == 4
    with pytest.raises(ConfigError, match=r"model=my-modle: .*Did you mean my-model\?"):
        compose("model=my-modle")


def test_a_named_folder_takes_the_place_of_the_working_directorys(folder: Path) -> None:
    other = folder / "with 'quotes' and, commas"
    (folder / "conf").rename(other)
    with pytest.raises(ConfigError, match="experiment=mine: there is no such option"):
        compose("experiment=mine")
    assert compose("--config-dir", str(other), "experiment=mine").training.total_steps == 77
    assert compose(f"--config-dir={other}", "experiment=mine").training.total_steps == 77
    with pytest.raises(ConfigError, match="--config-dir nowhere is no folder"):
        compose("--config-dir", "nowhere")


def test_what_a_command_composes_itself_has_the_named_folder_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A ladder's runs: `model=my-model` was unknown to them, in this process and in theirs."""
    (folder / "conf").rename(folder / "other")
    monkeypatch.setenv(presets.VARIABLE, "")
    monkeypatch.setattr(cli, "own_compiled_code", lambda: None)

    def job(_cfg: PretrainConfig) -> int:
        return compose("experiment=mine").training.total_steps

    monkeypatch.setattr("sys.argv", ["job", "--config-dir", "other", "model=my-model"])
    with pytest.raises(SystemExit) as end:
        cli.run(job, PretrainConfig, config="pretrain")
    assert end.value.code == 77, capsys.readouterr().err
    monkeypatch.setenv(presets.VARIABLE, "nowhere")
    with pytest.raises(ConfigError, match="PRETRAIN_CONFIG_DIR=nowhere is no folder of presets"):
        compose("experiment=mine")


def test_a_name_of_ours_is_refused_unless_it_is_the_same_file(folder: Path) -> None:
    """One of the two would be passed over, and nobody would know which."""
    copy = folder / "conf" / "model" / "tiny.yaml"
    copy.write_bytes((cli.CONF_DIR / "model" / "tiny.yaml").read_bytes())
    compose("experiment=mine")
    copy.write_text("name: tiny\n")
    with pytest.raises(ConfigError, match="conf/model/tiny.yaml has the name of a preset"):
        compose("experiment=mine")


def test_help_lists_both(folder: Path) -> None:
    found = presets.groups(PretrainConfig, "pretrain", [cli.CONF_DIR, folder / "conf"])
    assert "mine" in found["experiment"] and "quickstart" in found["experiment"]
    assert {"my-model", "tiny"} <= set(found["model"])


def test_threads_compose_beside_each_other():
    """Hydra's state belongs to the process: `tests.rehearsed_presets` of several processes ended in its ValueError."""
    words = [[f"optimizer.lr={number}e-4", "data.path=none"] for number in range(1, 9)]

    def lr(arguments: list[str]) -> float:
        return cli.compose(PretrainConfig, arguments, config="pretrain").optimizer.lr

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lr, words)) == pytest.approx([n * 1e-4 for n in range(1, 9)])


def test_a_program_that_uses_hydra_itself_composes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook, or an application under @hydra.main: its Hydra and its schemas are as before afterwards."""
    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", {**store.repo})
    store.store("pretrain_schema", {"their": "own"})
    kept = {**store.repo}
    with initialize(version_base="1.3"):
        theirs = GlobalHydra.instance().hydra
        assert (
            cli.compose(PretrainConfig, ["data.path=none"], config="pretrain").data.path == "none"
        )
        with pytest.raises(ConfigError):
            cli.compose(PretrainConfig, ["no.such=1"], config="pretrain")
        assert theirs is not None and GlobalHydra.instance().hydra is theirs
    assert store.repo == kept and "launcher" in kept["hydra"]
    assert not GlobalHydra.instance().is_initialized()


def test_hydra_finds_the_schema_and_nothing_to_run_programs_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those, and the schemas of other commands, were more than half of its time."""
    composes, stored = hydra.compose, list[dict[str, Any]]()

    def look(config: str, words: list[str], **options: Any) -> Any:
        stored.append(ConfigStore.instance().repo)
        return composes(config, words, **options)

    monkeypatch.setattr(hydra, "compose", look)
    cli.compose(SweepConfig, [], config="sweep")
    assert compose("model=tiny").name == "tiny"
    assert [set(one) for one in stored] == [
        {"sweep.yaml", "hydra"},
        {"pretrain_schema.yaml", "hydra"},
    ]
    for one in stored:
        assert list(one["hydra"]) == ["config.yaml"]
        assert one["hydra"]["config.yaml"].node.defaults == []


def test_a_preset_names_nothing_to_run_programs_with(folder: Path) -> None:
    """It would have no effect; where else to look for presets has one."""
    recipe = folder / "conf" / "experiment" / "mine.yaml"
    recipe.write_text(MINE.replace("defaults:", "defaults:\n  - override /hydra/job_logging: none"))
    with pytest.raises(ConfigError, match=r"experiment/mine.*hydra/job_logging"):
        compose("experiment=mine")
    assert compose("hydra.searchpath=[file://elsewhere]").training.total_steps == 1000


@pytest.mark.parametrize(
    "section",
    ["mode: MULTIRUN", "run: {dir: elsewhere}", "job: {chdir: true}", "help: {header: mine}"],
)
def test_a_preset_tells_hydra_nothing(folder: Path, section: str) -> None:
    """Its section `hydra` was taken, and nothing came of it."""
    (folder / "conf" / "experiment" / "mine.yaml").write_text(f"{MINE}hydra:\n  {section}\n")
    key = section.partition(":")[0]
    with pytest.raises(ConfigError, match=f"hydra.{key} in a preset is a setting of Hydra's"):
        compose("experiment=mine")
