"""checkpoint.json on the disk, and as the program sees it."""

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.checkpoint.record import CheckpointRecord, read_record
from pipeline.config.data import DataConfig
from pipeline.errors import CheckpointError
from tests.support.checkpoint_runs import record_of

# Written by the release before CheckpointRecord existed, byte for byte but for its paths.
VERSION_1 = (Path(__file__).parent / "checkpoint_v1.json").read_text()


def test_a_checkpoint_of_the_first_release_is_read_and_written_back_byte_for_byte():
    """The file is a format: other programs and older checkpoints stay.

    Neither a key, nor its order, nor its spacing may change without a new version.
    """
    record = CheckpointRecord.from_json(VERSION_1)
    assert (record.step, record.optimizer_step, record.tokens_seen) == (5, 4, 2560)
    assert record.state["skipped_steps"] == 1
    assert record.guard["ledger"][0]["kind"] == "bad_numbers"
    assert [facts["name"] for facts in record.datasets.values()] == ["train"]
    assert record.model().vocab_size == 400, "the config left it open"
    # Version 2 changed the tensors' files, and nothing here.
    assert record.to_json() == VERSION_1.replace('"version": 1,', '"version": 2,', 1)


def test_a_record_cannot_be_changed():
    """What is written is what was true when the save began."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        CheckpointRecord.from_json(VERSION_1).step = 6  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "something-else"}, "is not a checkpoint of this program"),
        ({"version": 3}, "has checkpoint format 3; this program reads up to 2"),
        ({"optimizer_step": None}, "has no optimizer_step"),
        ("half", "cannot be read"),
    ],
)
def test_a_record_of_no_use_says_which_file_and_why(tmp_path, change, message):
    """A missing key is named here, not as a KeyError in the middle of a restore."""
    if change == "half":
        text = VERSION_1[: len(VERSION_1) // 2]
    else:
        content = json.loads(VERSION_1) | change
        text = json.dumps(
            {
                key: value
                for key, value in content.items()
                if value is not None or key == "loss_scale"
            }
        )
    (tmp_path / "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_record(tmp_path)
    assert str(tmp_path / "checkpoint.json") in str(caught.value)


def test_what_a_newer_release_adds_is_let_be():
    """The version says what cannot be read; a key more is no reason to refuse."""
    content = json.loads(VERSION_1) | {"colour": "blue"}
    assert CheckpointRecord.from_json(json.dumps(content)) == CheckpointRecord.from_json(VERSION_1)


def test_a_strangers_settings_are_not_looked_up(monkeypatch):
    """The name of a model goes into the card of its export: so would a secret of this machine."""
    monkeypatch.setenv("SECRET", "s3cr3t")
    content = json.loads(VERSION_1)
    content["config"]["model"]["name"] = "${oc.env:SECRET}"
    record = CheckpointRecord.from_json(json.dumps(content))
    assert record.model().name == "${oc.env:SECRET}"


@pytest.mark.parametrize("seed", [-1, 2**53])
def test_a_seed_is_any_whole_number(seed):
    """seed=-1 trained, and its checkpoints were refused as damaged."""
    record = CheckpointRecord.from_json(VERSION_1)
    written = dataclasses.replace(record, config=record.config | {"seed": seed}).to_json()
    assert CheckpointRecord.from_json(written).config["seed"] == seed


@pytest.mark.parametrize(
    "setting", [{"hidden_dropout": 1.0}, {"rope_theta": 0.0}, {"hidden_size": 2**31}]
)
def test_numbers_of_no_model_are_refused(setting):
    """Those that a run refuses, and sizes that kernels cannot count."""
    content = json.loads(VERSION_1)
    content["config"]["model"] |= setting
    with pytest.raises(CheckpointError, match=f"of no model: model.{next(iter(setting))} "):
        CheckpointRecord.from_json(json.dumps(content)).model()


def test_a_folder_of_any_name_can_be_evaluated_afterwards():
    """`data.path=/d/${x}` trained, and its checkpoints were refused by evaluate."""
    content = json.loads(VERSION_1)
    path = "/d/${x} a${, [b]='c' {d} %s ~"
    content["config"]["data"] = {"train": [{"path": path}], "validation": [{"path": path}]}
    record = CheckpointRecord.from_json(json.dumps(content))
    assert [d.path for d in record.data().validation or []] == [path]


def test_a_checkpoint_does_not_say_where_its_shards_are_kept() -> None:
    """A stranger's record named a folder of this machine, where files were written and old shards deleted."""
    data = {"cache_dir": "/home/you", "cache_size_gib": 0.001, "lanes": 3}
    record = dataclasses.replace(record_of(1), config={"data": data})
    assert record.data() == DataConfig(lanes=3)
