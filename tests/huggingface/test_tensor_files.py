"""The tensors of a folder are those of its model, each of them once; looked at without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.errors import CheckpointError
from pipeline.huggingface.mapping import mapping_for
from pipeline.huggingface.settings import read_model_config
from pipeline.huggingface.tensor_files import check_tensors, weight_files
from tests.support.llama_folder import LLAMA_NAMES, write_llama
from tests.support.slurm_cluster import REPO

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def check(folder: Path) -> None:
    check_tensors(folder, mapping_for(read_model_config(folder)))


def cut_in_two(folder: Path) -> None:
    """Two files and their index, as transformers writes a large model."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = [names[::2], names[1::2]]
    for file, part in zip(SHARDS, parts, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
    files = {name: file for file, part in zip(SHARDS, parts, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "model.safetensors").unlink()


def lacks_a_file(folder: Path) -> None:
    cut_in_two(folder)
    (folder / SHARDS[1]).unlink()


def has_a_tensor_twice(folder: Path) -> None:
    cut_in_two(folder)
    tensors = load_file(folder / SHARDS[1])
    tensors["model.norm.weight"] = np.zeros(32, np.float32)
    save_file(tensors, folder / SHARDS[1])
    first = load_file(folder / SHARDS[0])
    first["model.norm.weight"] = np.ones(32, np.float32)
    save_file(first, folder / SHARDS[0])


def lacks_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def has_another(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    save_file(tensors, folder / "model.safetensors")


def is_quantised(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    save_file(tensors, folder / "model.safetensors")


def has_an_adapter_beside(folder: Path) -> None:
    """transformers takes the base that it names, and adds its matrices; ours are the bare weights."""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (has_an_adapter_beside, r"holds an adapter \(adapter_config.json\).*Merge it"),
        (lacks_a_file, "model-00002-of-00002.safetensors cannot be read"),
        (has_a_tensor_twice, "model.norm.weight is in model-00001.* and in model-00002"),
        (lacks_a_tensor, "has no tensor model.norm.weight"),
        (has_another, "q_norm.weight, which this program would not use"),
        (is_quantised, "lm_head.weight in .* is of type I8: the weights are quantised"),
    ],
)
def test_a_folder_that_is_not_its_model_is_refused(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    """From the heads of its files, before a rank has been started."""
    folder = write_llama(tmp_path / "whole")
    check(folder)
    shutil.copytree(folder, tmp_path / "two")
    cut_in_two(tmp_path / "two")
    check(tmp_path / "two")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        check(folder)


def test_one_file_counts_before_an_index_as_for_transformers(tmp_path: Path) -> None:
    """A folder that was saved into twice, whole and in parts: the other copy would be taken in silence."""
    folder = write_llama(tmp_path / "whole")
    whole = (folder / "model.safetensors").read_bytes()
    cut_in_two(folder)
    assert {path.name for path in weight_files(folder)} == set(SHARDS)
    (folder / "model.safetensors").write_bytes(whole)
    assert weight_files(folder) == [folder / "model.safetensors"]


@pytest.mark.slow
def test_transformers_takes_the_one_file_too(tmp_path: Path) -> None:
    """What the order above rests on: in a library that is not ours."""
    transformers = pytest.importorskip("transformers")
    folder = write_llama(tmp_path / "whole")
    whole = (folder / "model.safetensors").read_bytes()
    cut_in_two(folder)
    for file in SHARDS:
        tensors = load_file(folder / file)
        save_file({name: tensor * 0 for name, tensor in tensors.items()}, folder / file)
    (folder / "model.safetensors").write_bytes(whole)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight.abs().sum() > 0


def test_it_needs_no_torch(tmp_path: Path) -> None:
    """Preflight looks at the folder on a login node."""
    folder = write_llama(tmp_path / "whole")
    program = (
        "import sys; from pathlib import Path; folder = Path(sys.argv[1])\n"
        "from pipeline.huggingface.mapping import mapping_for\n"
        "from pipeline.huggingface.settings import read_model_config\n"
        "from pipeline.huggingface.tensor_files import check_tensors\n"
        "print(len(check_tensors(folder, mapping_for(read_model_config(folder)))))\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(LLAMA_NAMES)
