"""Adapter checkpoints: only what was trained, of one base, at any layout; merged they are a whole model."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint import tools
from pipeline.checkpoint.adapters import Base, base_of, delta
from pipeline.checkpoint.record import read_record
from pipeline.checkpoint.tensors import CheckpointTensors
from pipeline.errors import CheckpointError
from pipeline.files import sha256_of
from pipeline.huggingface.merge import merge
from pipeline.huggingface.whole_model import open_model
from tests.support.checkpoint_runs import Run, resume, train_and_save
from tests.support.layouts import config
from tests.support.ranks import run_on_ranks

MODEL = "modern"
LORA: dict[str, Any] = dict(train="*.lora_? final_norm.*", lora_rank=4)


def save_base(folder: Path) -> None:
    """A whole model, trained for two steps."""
    train_and_save(config(MODEL), folder, [2], 2)


def frozen_that_differ(cfg: Any, folder: Path, base: Path) -> tuple[int, list[str]]:
    """(number of frozen weights, those that are not bitwise the base's after two steps)."""
    from pipeline.engine import state

    run, tensors = Run(cfg, folder, base=base), CheckpointTensors(base)
    run.train(0, 2)
    frozen = {f.name: f.views["weight"] for f in state.frozen_fragments(run.engine)}
    wrong = []
    for name, weight in frozen.items():
        rows = tensors.tensor(f"weights/{name}").flatten()
        if not torch.equal(weight[: len(rows)], rows):  # padding rows come after
            wrong.append(name)
    run.close()
    return len(frozen), wrong


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base")
    run_on_ranks(save_base, 1, root)
    return folders.find(root)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(checkpoints of an adapter saved at step 3 under ZeRO-3, its history of 6 steps)."""
    root = tmp_path_factory.mktemp("adapter")
    cfg = config(MODEL, zero=3, **LORA)
    history = run_on_ranks(train_beside, 2, cfg, root, base)[0]
    return root, history


def train_beside(cfg: Any, root: Path, base: Path) -> Any:
    return train_and_save(cfg, root, [3], 6, base=base)


def resume_all(layouts: list[dict[str, Any]], root: Path, base: Path) -> list[Any]:
    return [resume(config(MODEL, **LORA, **layout), root, 6, base=base) for layout in layouts]


@pytest.mark.slow
def test_an_adapter_goes_on_at_any_layout(base: Path, adapter: tuple[Path, Any]) -> None:
    """Written by two ranks of ZeRO-3; the next losses and norms are those of the run that went on."""
    root, history = adapter
    layouts: dict[int, list[dict[str, Any]]] = {1: [{}], 2: [dict(pp=2), dict(tp=2, sp=True)]}
    for world_size, some in layouts.items():
        for found in run_on_ranks(resume_all, world_size, some, root, base)[0]:
            for have, want in zip(found, history[3:], strict=True):
                assert have == pytest.approx(want, rel=1e-5), some


def resume_without_moments(cfg: Any, root: Path, base: Path) -> Any:
    from pipeline.engine import state

    run = Run(cfg, root, base=base)
    assert run.checkpointer.restore(run.engine) is not None
    for fragment in state.fragments(run.engine):
        for key, view in fragment.views.items():
            if key != "weight":
                view.zero_()
    history = run.train(3, 6)
    run.close()
    return history


def test_a_resume_that_lost_the_moments_would_be_seen(
    base: Path, adapter: tuple[Path, Any]
) -> None:
    """The comparison above can fail: the first loss is the same, the next ones are not."""
    root, history = adapter
    found = run_on_ranks(resume_without_moments, 1, config(MODEL, **LORA), root, base)[0]
    assert found[0] == pytest.approx(history[3], rel=1e-5)
    assert abs(found[2][0] - history[5][0]) > 1e-4 * history[5][0]


@pytest.mark.slow
def test_an_adapter_of_four_ranks_goes_on_at_every_layout(base: Path, tmp_path: Path) -> None:
    """ZeRO-3 with TP and SP: A or B whole, split and partitioned at once."""
    cfg = config(MODEL, zero=3, tp=2, sp=True, **LORA)
    history = run_on_ranks(train_beside, 4, cfg, tmp_path, base)[0]
    layouts: dict[int, list[dict[str, Any]]] = {
        1: [{}],
        2: [dict(pp=2), dict(tp=2), dict(zero=1), dict(zero=2), dict(pp=2, schedule="dualpipev")],
        4: [dict(pp=2, tp=2, sp=True), dict(tp=2, zero=1)],
    }
    for world_size, some in layouts.items():
        for found in run_on_ranks(resume_all, world_size, some, tmp_path, base)[0]:
            for have, want in zip(found, history[3:], strict=True):
                assert have == pytest.approx(want, rel=1e-5), some


def test_only_what_is_trained_is_saved(base: Path, adapter: tuple[Path, Any]) -> None:
    """Without a frozen name, and with the moments of what is there."""
    folder = folders.find(adapter[0])
    tensors = CheckpointTensors(folder)
    assert {n for n in tensors.parameters if ".lora_" not in n} == {"final_norm.weight"}
    assert len(tensors.parameters) == 1 + 4 * 4 * 2
    assert tensors.optimizer_keys == ["exp_avg", "exp_avg_sq"]
    record = read_record(folder)
    assert record.base == {"path": str(base), "sha256": base_of(base).sha256}
    assert record.finetune().lora_rank == 4
    size = sum(math.prod(tensors.shape(name)) * 4 for name in tensors.names)
    assert record.size_bytes == size < read_record(base).size_bytes / 3


def test_frozen_weights_are_bitwise_the_bases(base: Path, tmp_path: Path) -> None:
    """Read where they lie in the model, and not moved by training."""
    cfg, all_of_it = config(MODEL, **LORA), CheckpointTensors(base).parameters
    assert run_on_ranks(frozen_that_differ, 1, cfg, tmp_path, base)[0] == (len(all_of_it) - 1, [])


def test_merged_weights_are_base_and_product_in_fp32(base: Path, adapter: tuple[Path, Any]) -> None:
    own, whole, merged = (
        CheckpointTensors(folders.find(adapter[0])),
        CheckpointTensors(base),
        open_model(folders.find(adapter[0])),
    )
    assert merged.parameters == whole.parameters
    at = "weights/layers.1.mlp.linear_fc1"
    a, b = own.tensor(f"{at}.lora_a"), own.tensor(f"{at}.lora_b")
    expected = whole.tensor(f"{at}.weight") + 2.0 * b @ a  # alpha 8, rank 4
    assert torch.equal(merged.tensor(f"{at}.weight"), expected)
    assert not torch.equal(expected, whole.tensor(f"{at}.weight"))
    name = "weights/final_norm.weight"
    assert torch.equal(merged.tensor(name), own.tensor(name))
    name = "weights/head.weight"
    assert torch.equal(merged.tensor(name), whole.tensor(name))
    assert merged.shape(name) == whole.shape(name)


def test_delta_is_the_product_of_the_two() -> None:
    """By hand: alpha 6, rank 2, so three times B A."""
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    b = torch.tensor([[1.0, 1.0], [0.0, 1.0], [2.0, 0.0]])
    expected = torch.tensor([[3.0, 6.0], [0.0, 6.0], [6.0, 0.0]])
    assert torch.equal(delta(a, b, alpha=6.0), expected)


def test_another_base_is_refused(base: Path, adapter: tuple[Path, Any], tmp_path: Path) -> None:
    """The same sizes and other numbers: the adapter would be wrong, and nothing would say so."""
    other = tmp_path / "other"
    shutil.copytree(base, other)
    record, sums = other / "checkpoint.json", other / "SHA256SUMS"
    was = sha256_of(record)
    record.write_bytes(record.read_bytes() + b"\n")
    sums.write_text(sums.read_text().replace(was, sha256_of(record)))
    with pytest.raises(CheckpointError, match="is not the base of this adapter"):
        open_model(folders.find(adapter[0]), base=other)
    with pytest.raises(CheckpointError, match="is not in .* where it is now with base="):
        open_model(folders.find(adapter[0]), base=tmp_path / "nowhere")
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    assert open_model(folders.find(adapter[0]), base=moved).parameters
    weights = next(moved.glob("rank-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CheckpointError, match="the base .*moved is damaged"):
        open_model(folders.find(adapter[0]), base=moved)


def test_a_hugging_face_folder_is_known_by_all_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = base_of(tmp_path)
    first.check(Base("elsewhere", first.sha256))
    (tmp_path / "model.safetensors").write_bytes(b"two")
    with pytest.raises(CheckpointError, match="not the base"):
        first.check(base_of(tmp_path))


def test_the_tools_know_adapters(
    adapter: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders.find(adapter[0])
    assert tools.show(folder) == 0
    shown = capsys.readouterr().out
    assert "a part of a model, beside the base" in shown and "base.sha256" in shown
    assert tools.verify(folder) == 0
    assert tools.diff(folder, folder) == 0


def differences(one: Path, two: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What diff prints of two checkpoints that are not equal."""
    assert tools.diff(one, two) == 1
    return capsys.readouterr().out


def test_diff_says_whether_two_checkpoints_are_of_one_model(
    base: Path, adapter: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal low-rank matrices beside unlike bases are unlike models; a part is no whole."""
    own = folders.find(adapter[0])
    part = f"is a part of a model, beside the base in {base}, and"
    assert f"\na {part} b is a whole one" in differences(own, base, capsys)
    assert f"\nb {part} a is a whole one" in differences(base, own, capsys)
    moved = tmp_path / "moved"
    shutil.copytree(own, moved)
    record = json.loads((moved / "checkpoint.json").read_text())
    record["base"] = {"path": "/elsewhere", "sha256": "5" * 64}
    (moved / "checkpoint.json").write_text(json.dumps(record))
    assert tools.diff(own, moved) == 0  # of what they hold, all is equal
    said = f"a and b are parts of different models: a beside {base} .sha256 .*, b beside /elsewhere"
    assert re.search(said, capsys.readouterr().out)
    record["base"]["sha256"] = base_of(base).sha256  # the same base, found elsewhere
    (moved / "checkpoint.json").write_text(json.dumps(record))
    assert tools.diff(own, moved) == 0
    assert "of different models" not in capsys.readouterr().out


def test_adapters_of_one_base_are_shown_compared_and_merged(
    base: Path, adapter: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is a run of its own; merged they differ where they were trained, and only there."""
    cfg = config(MODEL, train="layers.1.*.lora_?", lora_rank=2)
    run_on_ranks(train_beside, 1, cfg, tmp_path / "other", base)
    found = []
    for number, root in enumerate((adapter[0], tmp_path / "other")):
        assert tools.show(root) == 0
        assert f"beside the base in {base}" in capsys.readouterr().out
        assert merge(root, tmp_path / f"{number}") == 0
        found.append(folders.find(root))
    assert "only in a: weights/final_norm.weight" in differences(*found, capsys)
    merged = [tmp_path / "0", tmp_path / "1"]
    table = differences(*merged, capsys)
    assert "a whole one" not in table and "only in" not in table
    for name, is_same in (("head", True), ("layers.0.mlp.linear_fc1", False), ("layers.1.mlp.linear_fc1", False)):  # fmt: skip
        (row,) = [line for line in table.splitlines() if line.endswith(f"weights/{name}.weight")]
        assert (float(row.split()[0]) == 0) is is_same, row
    first = CheckpointTensors(merged[1]).tensor("weights/layers.0.mlp.linear_fc1.weight")
    assert torch.equal(first, CheckpointTensors(base).tensor("weights/layers.0.mlp.linear_fc1.weight"))  # fmt: skip


def test_a_whole_run_cannot_go_on_from_an_adapter(base: Path, adapter: tuple[Path, Any]) -> None:
    """Its checkpoint has no frozen weights."""
    with pytest.raises(AssertionError, match="it was written by another model"):
        run_on_ranks(resume, 1, replace(config(MODEL)), adapter[0], 6)


def test_merge_writes_a_whole_checkpoint(
    base: Path, adapter: tuple[Path, Any], tmp_path: Path
) -> None:
    """Every byte accounted for, with the weights that export and generate see, and no base any more."""
    output = tmp_path / "merged"
    assert merge(adapter[0], output) == 0
    assert folders.damage(output) == [] and read_record(output).base is None
    written, expected = open_model(output), open_model(folders.find(adapter[0]))
    assert isinstance(written, CheckpointTensors)
    assert written.parameters == expected.parameters and written.optimizer_keys == []
    for name in written.parameters:
        entry = f"weights/{name}"
        assert torch.equal(written.tensor(entry), expected.tensor(entry)), name
    with pytest.raises(CheckpointError, match="there is nothing to merge"):
        merge(output, tmp_path / "again")
    with pytest.raises(CheckpointError, match="is not empty"):
        merge(adapter[0], output)
