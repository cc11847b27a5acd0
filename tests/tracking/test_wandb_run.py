"""A run is one run of W&B, whatever happens to the file that knows its id."""

import errno

import pytest

from pipeline.tracking import wandb_run


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
