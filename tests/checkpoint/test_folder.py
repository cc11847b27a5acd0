"""A folder of checkpoints: what is in it is read and shown, damage is found, the right ones are kept."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.__main__ import ToolConfig, main
from pipeline.checkpoint.tensors import CheckpointTensors
from pipeline.errors import CheckpointError
from pipeline.model.fragments import Chunk
from tests.support.checkpoint_runs import record_of


def test_checkpoint_is_read_without_a_process_group(small: Path) -> None:
    """Export, generation and people's own scripts read it in one plain process."""
    tensors = CheckpointTensors(small / folders.name_of(2))
    assert tensors.names == ["weights/a"] and (small / "latest").read_text() == "step-00000002\n"
    assert torch.equal(
        tensors.tensor("weights/a"), 2.0 + torch.arange(40.0)[:, None].expand(40, 30)
    )
    assert set(folders.read_sums(small / folders.name_of(2))) == {
        "rank-00000.safetensors",
        "rank-00001.safetensors",
        "tensors.json",
        "checkpoint.json",
    }
    subprocess.run(
        ["sha256sum", "--check", "--quiet", "SHA256SUMS"],
        cwd=small / folders.name_of(2),
        check=True,
    )


def test_any_rectangle_is_read(small: Path) -> None:
    """Another layout asks for rectangles that cross those of the writers."""
    data = torch.zeros(7, 4)
    CheckpointTensors(small / folders.name_of(1)).read_into(
        [Chunk("weights/a", (40, 30), (17, 9), data)]
    )
    assert torch.equal(data, 1.0 + torch.arange(17.0, 24.0)[:, None].expand(7, 4))


@pytest.mark.parametrize("how", ["flip", "truncate", "append", "delete"])
def test_damage_to_any_file_is_found(how: str, small: Path, tmp_path: Path) -> None:
    """A checkpoint with one wrong byte must not be trained on."""
    draw = random.Random(how)
    names = [p.name for p in (small / folders.name_of(2)).iterdir()]
    assert len(names) == 5
    for name in names:
        for _ in range(8 if how == "flip" else 1):
            copy = shutil.copytree(small / folders.name_of(2), tmp_path / "copy")
            assert folders.damage(copy) == []
            content = bytearray((copy / name).read_bytes())
            if how == "flip":
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            content = (
                content[:-1]
                if how == "truncate"
                else content + b" "
                if how == "append"
                else content
            )
            (copy / name).unlink()
            if how != "delete":
                (copy / name).write_bytes(content)
            assert folders.damage(copy), f"{how} {name}"
            shutil.rmtree(copy)


@given(
    steps=st.sets(st.integers(1, 60), max_size=20), last=st.integers(0, 5), every=st.integers(0, 7)
)
def test_pruning_keeps_the_newest_and_the_multiples(steps: set[int], last: int, every: int) -> None:
    """The newest checkpoint is never deleted, whatever the settings."""
    gone = folders.to_prune(steps, keep_last=last, keep_every=every)
    newest = sorted(steps)[-max(1, last) :]
    assert set(gone) == {s for s in steps if s not in newest and not (every and s % every == 0)}


def test_pruning_spares_what_was_just_written_and_what_latest_names(tmp_path: Path) -> None:
    """Below older, higher steps the new checkpoint was the oldest: it went, and `latest` named nothing."""
    for step in (3, 50, 60):
        (tmp_path / folders.name_of(step)).mkdir()
    (tmp_path / "latest").write_text("step-00000050\n")
    assert folders.prune(tmp_path, written=3, keep_last=1, keep_every=0) == []
    (tmp_path / "latest").write_text("step-00000003\n")
    gone = folders.prune(tmp_path, written=3, keep_last=1, keep_every=0)
    assert gone == [tmp_path / "step-00000050"]


def test_a_step_that_is_written_again_is_there_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleting the old one takes seconds; until the new one has the name, only its name may be gone."""
    deleted_while = []
    monkeypatch.setattr(
        folders.shutil, "rmtree",
        lambda path, **_: path.exists() and deleted_while.append([s for s, _ in folders.list_checkpoints(tmp_path)]),
    )  # fmt: skip
    for _ in range(2):
        folders.saving_folder(tmp_path, 7).mkdir()
        folders.publish(tmp_path, record_of(7), {})
    assert deleted_while == [[7]]


def test_a_list_of_nothing_says_so_and_where_runs_are(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The head of an empty table was printed, then an error that asked for what had been given."""
    run = tmp_path / "runs" / "young"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    with pytest.raises(CheckpointError, match="the run .*young has no checkpoint yet"):
        main(ToolConfig("list", str(run)))
    shutil.copytree(small, tmp_path / "runs" / "old" / "checkpoints")
    with pytest.raises(CheckpointError, match="nope is no folder.* There are .*runs/old"):
        main(ToolConfig("list", str(tmp_path / "runs" / "nope")))
    with pytest.raises(CheckpointError, match="holds none.* There are .*runs/old"):
        main(ToolConfig("list", str(tmp_path / "runs")))
    assert capsys.readouterr().out == ""


def test_a_checkpoint_is_shown_without_torch(small: Path) -> None:
    """Whose import was all but a third of a second of it."""
    program = (
        "import sys; from pipeline.checkpoint import tools; from pathlib import Path; "
        "tools.show(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(small)], capture_output=True, text=True
    )
    assert done.returncode == 0 and "1,200 in 1 tensors" in done.stdout, done.stderr


def test_tools_list_verify_show_and_diff(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """What a person sees, and the exit codes a script sees."""
    assert main(ToolConfig("verify", str(small))) == 0
    assert capsys.readouterr().out.count(": good") == 2
    one, two = (str(small / folders.name_of(step)) for step in (1, 2))
    assert main(ToolConfig("diff", one, two)) == 1
    assert "1.0000e+00    1.0000e+00" in capsys.readouterr().out
    copy = shutil.copytree(two, tmp_path / "copy")
    (copy / "checkpoint.json").write_text("{}")
    assert main(ToolConfig("verify", str(copy))) == 1
    assert "checkpoint.json: content is not what was written" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="list, verify, show, diff"):
        main(ToolConfig("lst", str(small)))
    with pytest.raises(CheckpointError, match="nowhere is no folder"):
        main(ToolConfig("show", str(tmp_path / "nowhere")))
    output = subprocess.run(
        [sys.executable, "-m", "pipeline.checkpoint", "list", str(small)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(small / folders.name_of(2)) in output
    assert main(ToolConfig("show", str(small))) == 0
    assert "parameters: 1,200 in 1 tensors" in capsys.readouterr().out
    assert json.loads((small / folders.name_of(2) / "checkpoint.json").read_text())["step"] == 2
