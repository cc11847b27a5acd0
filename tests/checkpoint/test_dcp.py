"""pipeline.checkpoint.dcp: checkpoints of version 1 load, and their pickle runs nothing."""

from __future__ import annotations

import ast
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.folder import damage
from pipeline.checkpoint.record import read_record
from pipeline.checkpoint.tensors import CheckpointTensors
from pipeline.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
# Written by two ranks of the release before version 2, each with three rows of a 6 x 5 matrix.
OLD = Path(__file__).with_name("version_1") / "step-00000001"


def test_a_checkpoint_of_version_1_loads():
    tensors = CheckpointTensors(OLD)
    assert damage(OLD) == []
    assert (tensors.names, read_record(OLD).optimizer) == (["exp_avg/a", "weights/a"], "adamw")
    assert torch.equal(tensors.tensor("weights/a"), torch.arange(30.0).reshape(6, 5))
    assert torch.equal(tensors.tensor("exp_avg/a"), -torch.arange(30.0).reshape(6, 5))


class Canary:
    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple:
        return self.call, self.arguments


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "pathlib.Path.touch", "torch.load"])
def test_looking_at_a_strangers_checkpoint_runs_nothing(tmp_path, name):
    """show, diff, export, generate, evaluate and init_from all read the tensors' index."""
    import builtins
    import os

    canary = tmp_path / "canary"
    calls = {
        "os.system": Canary(os.system, f"touch {canary}"),
        "builtins.eval": Canary(builtins.eval, f"open({str(canary)!r}, 'w')"),
        "pathlib.Path.touch": Canary(Path.touch, canary),
        "torch.load": Canary(torch.load, str(canary)),
    }
    folder = shutil.copytree(OLD, tmp_path / "x")
    (folder / ".metadata").write_bytes(pickle.dumps(calls[name]))
    with pytest.raises(CheckpointError, match="which no checkpoint needs"):
        CheckpointTensors(folder)
    assert not canary.exists()


def test_a_file_elsewhere_is_not_opened(tmp_path):
    folder = shutil.copytree(OLD, tmp_path / "x")
    raw = (folder / ".metadata").read_bytes()
    assert raw.count(b"__0_0.distcp") == 1
    (folder / ".metadata").write_bytes(raw.replace(b"__0_0.distcp", b"../x0.distcp"))
    with pytest.raises(CheckpointError, match="it names the file ../x0.distcp"):
        CheckpointTensors(folder)


def test_no_other_file_of_the_project_unpickles():
    """A pickle is a program: it is loaded in one place, which refuses all but a dozen names."""
    found = []
    for path in sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("data_prep/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
                if names & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}:
                    found.append(path.relative_to(ROOT).as_posix())
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if call == "torch.load" and options.get("weights_only") != "True":
                    found.append(f"{path}: torch.load")
                if call == "np.load" and options.get("allow_pickle", "False") != "False":
                    found.append(f"{path}: np.load")
                if call in ("eval", "exec", "yaml.load"):
                    found.append(f"{path}: {call}")
                if options.get("trust_remote_code", "False") != "False":
                    found.append(f"{path}: trust_remote_code")
    assert found == ["pipeline/checkpoint/dcp.py"]
