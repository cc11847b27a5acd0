"""Where a run's record says that it ran."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from pipeline.tracking import environment as module
from pipeline.tracking.environment import environment, git_commit


def test_the_record_names_versions_machine_and_command():
    found = environment()
    assert found["versions"]["torch"] == torch.__version__
    assert found["command"] == sys.argv
    assert found["num_cpus"] >= 1


def test_the_commit_says_when_files_differ_from_it(tmp_path, monkeypatch):
    """A run whose source nobody has kept must be recognised as such."""
    source = tmp_path / "pipeline" / "environment.py"
    source.parent.mkdir()
    shutil.copy(module.__file__, source)
    monkeypatch.setattr(module, "__file__", str(source))
    assert git_commit() is None

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert git_commit() == commit
    source.write_text("changed\n")
    assert git_commit() == f"{commit}-dirty"


def test_a_machine_without_git_does_not_stop_a_run(monkeypatch):
    monkeypatch.setenv("PATH", str(Path("/nowhere")))
    assert git_commit() is None
