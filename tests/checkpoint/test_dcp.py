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


PICKLES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
# What runs what a file says, whatever its options.
RUNS = {
    *("eval", "exec", "compile", "execfile", "__import__", "input"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.Loader"),
    *("pd.read_pickle", "pandas.read_pickle", "torch.hub.load", "torch.jit.load", "runpy.run_path"),
    *("np.fromstring", "os.system", "os.popen", "jinja2.Environment", "jinja2.Template"),
}
ASKED = {  # call -> the option that must stand in it
    "torch.load": ("weights_only", "True"),
    "AutoTokenizer.from_pretrained": ("trust_remote_code", "False"),
}


def what_runs_code(source: str) -> list[str]:
    """Places of a program that may run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in modules if name.split(".")[0] in PICKLES]
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        wanted = ASKED.get(call)
        if call in RUNS or (wanted and options.get(wanted[0]) != wanted[1]):
            found.append(call)
        for option in ("allow_pickle", "trust_remote_code", "shell"):
            if options.get(option, "False") != "False":
                found.append(f"{call}({option}=)")
        if options.get("weights_only", "True") != "True":
            found.append(f"{call}(weights_only=)")
    return found


def test_no_other_file_of_the_project_runs_what_a_file_says():
    """A pickle is a program: it is loaded in one place, which refuses all but a dozen names."""
    folders = ("pipeline", "data_prep", "benchmarks", "tools")
    found = {
        path.relative_to(ROOT).as_posix(): places
        for folder in folders
        for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
        if (places := what_runs_code(path.read_text()))
    }
    assert found.pop("pipeline/checkpoint/dcp.py") == ["pickle"]
    assert found.pop("pipeline/generate.py") == ["input"]  # what a person types is a prompt
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "from pickle import loads",
        "import pickle as p",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f, Loader=yaml.Loader)",
        "AutoTokenizer.from_pretrained(f)",
        "AutoModel.from_pretrained(f, trust_remote_code=True)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_search_finds(line):
    """It would be green for ever otherwise."""
    assert what_runs_code(line)
