"""A run is one run of W&B, whatever happens to the file that knows its id."""

import errno

import pytest

from pipeline.config.choices import WandbMode, XAxis
from pipeline.config.operation import TrackingConfig
from pipeline.tracking import wandb_run
from pipeline.tracking.samples import Sample
from pipeline.tracking.tracker import At


def test_a_wandb_id_that_cannot_be_read_now_stays(tmp_path, monkeypatch):
    """A network disk that was gone for a moment would split the run in two."""
    (tmp_path / "wandb-id").write_text("abc")

    def stale(path, **_):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Stale"):
        patch.setattr(wandb_run, "read_file", stale)
        wandb_run._wandb_id(tmp_path)
    assert wandb_run._wandb_id(tmp_path) == "abc"
    (tmp_path / "wandb-id").write_text("a b")
    assert wandb_run._wandb_id(tmp_path) == (tmp_path / "wandb-id").read_text() != "a b"


class Run:
    """What wandb.init gives, as far as it is used."""

    url = "somewhere"

    def __init__(self) -> None:
        self.metrics, self.rows, self.artifacts, self.summary = [], [], [], {}
        self.exit_code = -1

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, row):
        self.rows.append(row)

    def log_artifact(self, artifact, aliases):
        self.artifacts.append((artifact, aliases))

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.mark.parametrize("axis", list(XAxis))
def test_steps_and_tokens_are_axes_and_the_run_has_a_summary(tmp_path, monkeypatch, axis):
    """Runs of different batch sizes compare by tokens only."""
    import wandb

    run = Run()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    made = wandb_run.WandbRun(
        TrackingConfig(wandb=WandbMode.offline, x_axis=axis), run_dir=tmp_path, config={}
    )
    assert not made.is_known()
    made.open(None)
    made.log(At(2, 64, 1.0), {"train/loss": 3.0})
    made.summarize(At(2, 64, 1.0), {"best/loss": 3.0, "best/step": 2})
    made.close(5)
    assert run.metrics == [("step", None), ("tokens", None), ("*", axis.name)]
    assert run.rows == [{"step": 2, "tokens": 64, "train/loss": 3.0}]
    assert (run.summary, run.exit_code) == ({"best/loss": 3.0, "best/step": 2}, 5)
    assert made.is_known(), "its id is kept"


def test_samples_are_a_table_that_says_when_each_was_written(tmp_path, monkeypatch):
    """W&B joins the tables of all steps: a row without its step and tokens could not be placed."""
    import wandb

    run = Run()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    made = wandb_run.WandbRun(TrackingConfig(wandb=WandbMode.offline), run_dir=tmp_path, config={})
    made.open(None)
    made.log_samples(At(2, 64, 1.0), [Sample("Once", " upon"), Sample("", "a\nb")])
    (row,) = run.rows
    table = row.pop("samples")
    assert row == {"step": 2, "tokens": 64}
    assert table.columns == ["step", "tokens", "prompt", "text"]
    assert table.data == [[2, 64, "Once", " upon"], [2, 64, "", "a\nb"]]


def test_an_exported_model_is_an_artifact_of_its_step_without_a_copy(tmp_path, monkeypatch):
    """Gigabytes; and a point of a sweep has a name that W&B's artifacts cannot have."""
    import wandb

    run, run_dir, folder = Run(), tmp_path / "000-lr=0.01,seed=1", tmp_path / "exported"
    run_dir.mkdir()
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    made = wandb_run.WandbRun(TrackingConfig(wandb=WandbMode.offline), run_dir=run_dir, config={})
    made.open(None)
    made.keep_model(At(7, 224, 1.0), folder, {"dtype": "bf16"})
    ((artifact, aliases),) = run.artifacts
    assert (artifact.name, artifact.type) == ("000-lr-0.01-seed-1", "model")
    assert aliases == ["latest", "step-7"]
    assert artifact.metadata == {"step": 7, "tokens": 224, "time": 1.0, "dtype": "bf16"}
    assert artifact.manifest.entries["config.json"].local_path == str(folder / "config.json")
    assert not [path for path in (tmp_path / "staged").rglob("*") if path.is_file()]


def test_wandb_is_online_only_with_a_key_or_by_request(monkeypatch):
    """A machine without a key must not ask for one."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert wandb_run._wandb_mode(WandbMode.auto) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_run._wandb_mode(WandbMode.auto) == "online"
    assert wandb_run._wandb_mode(WandbMode.offline) == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_run._wandb_mode(WandbMode.auto) == "offline"
