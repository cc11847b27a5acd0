"""Checkpoints: any layout resumes any other, and nothing a crash or a bad disk does is taken for a checkpoint."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checkpoint import checkpointer as checkpoint_module
from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.__main__ import ToolConfig, main
from pipeline.checkpoint.agreement import Agreement
from pipeline.checkpoint.checkpointer import Checkpointer
from pipeline.checkpoint.record import CheckpointRecord
from pipeline.checkpoint.tensors import CheckpointTensors, HostCopy, write
from pipeline.config.operation import CheckpointConfig
from pipeline.distributed.ranks import Ranks
from pipeline.engine import state
from pipeline.errors import CheckpointError
from pipeline.log import logger
from pipeline.model.fragments import Chunk, Fragment
from pipeline.model.partition import Partition
from tests.support.checkpoint_runs import Run, resume, train_and_save
from tests.support.layouts import allow_fp16_on_the_cpu, config
from tests.support.ranks import PRELOAD, run_on_ranks
from tests.support.waiting import HANG_S

# ---- any layout to any layout -----------------------------------------------------------------------------------

SAVED, LAST = 3, 5
# All that a checkpointer needs of a layout to write chunks.
ALONE: Any = SimpleNamespace(ranks=Ranks(0, 1, 0, 1, "here"))


def four_ranks(model: str, precision: str, folder: Path) -> dict[str, list]:
    """Save at TP2 x PP2, go on; then resume the same and other layouts of four ranks."""
    source = config(
        model, tp=2, pp=2, precision=precision, dropout=0.1 if precision == "bf16" else 0.0
    )
    histories = {"source": train_and_save(source, folder, [SAVED], LAST)[SAVED:]}
    histories["same"] = resume(source, folder, LAST)
    if precision == "fp32":
        histories["pp4"] = resume(config(model, pp=4), folder, LAST)
        histories["tp2 dp2 zero3"] = resume(
            config(model, tp=2, zero=3), folder, LAST, save_to=folder / "zero3"
        )
    return histories


def two_ranks(model: str, folder: Path) -> dict[str, list]:
    """Resume on two ranks."""
    return {
        "dualpipev": resume(
            config(model, pp=2, schedule="dualpipev", micro_batch_size=1),
            folder,
            LAST,
            save_to=folder / "dualpipev",
        ),
        "dp2 zero2 from zero3": resume(config(model, zero=2), folder / "zero3", LAST),
    }


def one_rank(model: str, folder: Path) -> dict[str, list]:
    """Resume in one process, write it again."""
    return {
        "zero0": resume(config(model, zero=0), folder, LAST),
        "tp1": resume(config(model), folder, LAST, save_to=folder / "one"),
    }


@pytest.mark.parametrize("model", ["gpt2", "modern"])
def test_every_layout_resumes_a_checkpoint_of_every_other(model: str, tmp_path: Path) -> None:
    """The first loss after a move is equal, later ones within fp32 rounding; the files hold the same bits again."""
    found = run_on_ranks(four_ranks, 4, model, "fp32", tmp_path)[0]
    found |= run_on_ranks(two_ranks, 2, model, tmp_path)[0]
    found |= run_on_ranks(one_rank, 1, model, tmp_path)[0]
    found["back"] = run_on_ranks(resume, 4, config(model, tp=2, pp=2), tmp_path / "one", LAST)[0]
    expected = found.pop("source")
    assert found["same"] == expected and found["back"] == expected
    for layout, history in found.items():
        assert history[0][0] == pytest.approx(expected[0][0], rel=2e-7), layout
        for got, want in zip(history, expected, strict=True):
            assert got == pytest.approx(want, rel=1e-5), layout
    sizes = [
        path.stat().st_size for path in (folders.find(tmp_path / "zero3")).glob("*.safetensors")
    ]
    assert len(sizes) == 4 and max(sizes) < 1.25 * min(sizes), "writers are not balanced"
    original = folders.find(tmp_path)
    for copy in ("zero3", "dualpipev", "one"):
        assert main(ToolConfig("diff", str(original), str(tmp_path / copy))) == 0


@pytest.mark.parametrize("model", [pytest.param("gpt2", marks=pytest.mark.slow), "modern"])
def test_same_layout_resumes_bitwise_in_bf16_with_dropout(model: str, tmp_path: Path) -> None:
    """A restart must not show: master weights, moments and dropout streams continue exactly."""
    found = run_on_ranks(four_ranks, 4, model, "bf16", tmp_path)[0]
    assert found["same"] == found["source"]


def fp16_again(folder: Path) -> list[Any]:
    """Train in fp16, whose loss scale falls in the first steps; resume."""
    allow_fp16_on_the_cpu()
    run = Run(config("gpt2", precision="fp16"), folder)
    run.engine.loss_scale.cur_scale.fill_(2.0**22)
    run.train(0, SAVED)
    run.save(SAVED)
    scaler = run.engine.loss_scale.state()
    history = run.train(SAVED, LAST)
    run.close()
    again = Run(config("gpt2", precision="fp16"), folder)
    again.checkpointer.restore(again.engine)
    found = again.engine.loss_scale.state()
    resumed = again.train(SAVED, LAST)
    again.close()
    return [scaler, found, history, resumed]


def test_fp16_continues_with_its_loss_scale(tmp_path: Path) -> None:
    """A fresh scale would skip steps that the uninterrupted run does not skip."""
    scaler, found, history, resumed = run_on_ranks(fp16_again, 1, tmp_path)[0]
    assert scaler["scale"] < 2.0**22 and scaler["good_steps"] < SAVED
    assert found == scaler and resumed == history


def offloaded(folder: Path) -> list[list]:
    """A state that moves from the device to the host and back."""
    source = train_and_save(config("gpt2"), folder, [SAVED], LAST)[SAVED:]
    on_host = resume(config("gpt2", offload=True, zero=2), folder, LAST, save_to=folder / "host")
    return [source, on_host, resume(config("gpt2"), folder / "host", LAST)]


@pytest.mark.slow
def test_optimizer_state_moves_to_the_host_and_back(tmp_path: Path) -> None:
    """DeepSpeedCPUAdam keeps its step count as an integer, torch's AdamW as a tensor."""
    source, on_host, back = run_on_ranks(offloaded, 1, tmp_path)[0]
    assert back == source
    for got, want in zip(on_host, source, strict=True):
        assert got == pytest.approx(want, rel=1e-5)


def save_then_train(asynchronous: bool, folder: Path) -> None:
    cfg = config("gpt2")
    cfg.checkpoint.asynchronous = asynchronous
    train_and_save(cfg, folder, [1, 2], 4)


def test_steps_after_an_asynchronous_save_are_not_in_it(tmp_path: Path) -> None:
    """Training goes on while the file is written; the file is the state at the save."""
    for name in ("background", "foreground"):
        run_on_ranks(save_then_train, 1, name == "background", tmp_path / name)
    for step in (1, 2):
        paths = [
            str(tmp_path / name / folders.name_of(step)) for name in ("background", "foreground")
        ]
        assert main(ToolConfig("diff", *paths)) == 0


# ---- damage -----------------------------------------------------------------------------------------------------


def write_small(folder: Path, steps: list[int]) -> None:
    """Checkpoints of one 40 x 30 matrix in two rectangles. Collective."""
    cfg = CheckpointConfig(keep_last=99)
    checkpointer = Checkpointer(cfg, folder=folder, layout=ALONE)
    for step in steps:
        checkpointer._write(small_chunks(step), record_of(step))
        assert checkpointer._outcome is None, checkpointer._outcome


def small_chunks(step: int, size: int = 40) -> list[Chunk]:
    """This rank's rows of a matrix that says which step it is of."""
    world, rank = dist.get_world_size(), dist.get_rank()
    rows = size // world
    data = (
        torch.full((rows, 30), float(step)) + torch.arange(rows * rank, rows * (rank + 1))[:, None]
    )
    return [Chunk("weights/a", (size, 30), (rows * rank, 0), data)]


def record_of(step: int) -> CheckpointRecord:
    return CheckpointRecord(
        state={}, config={}, step=step, optimizer="adamw", optimizer_step=step, loss_scale=None, vocab_size=7,
        layout={}, versions={}, saved_at="now",
    )  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints of steps 1 and 2, written by two ranks."""
    folder = tmp_path_factory.mktemp("small")
    run_on_ranks(write_small, 2, folder, [1, 2])
    return folder


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


def restore_after_damage(folder: Path) -> tuple[dict, list[str], list]:
    run = Run(config("gpt2"), folder)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    record = run.checkpointer.restore(run.engine)
    assert record is not None
    history = run.train(record.step, 4)
    run.save(4)
    run.close()
    return record, messages, history


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    how: str, tmp_path: Path
) -> None:
    """A node that died with a dirty cache must not cost the run, nor go unnoticed.

    Tensors are read while they are checked: a cut file cannot be read, a flipped bit can.
    """
    history = run_on_ranks(train_and_save, 1, config("gpt2"), tmp_path, [2, 3], 4)[0]
    newest = tmp_path / folders.name_of(3) / "rank-00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[-2000] ^= 64
    newest.write_bytes(content[:-1000] if how == "cut" else content)
    record, messages, resumed = run_on_ranks(restore_after_damage, 1, tmp_path)[0]
    assert record.step == 2 and resumed == history[2:]
    assert any(
        "step-00000003 is DAMAGED" in message and "rank-00000.safetensors" in message
        for message in messages
    )
    assert (tmp_path / "damaged-step-00000003").is_dir()
    assert [step for step, _ in folders.list_checkpoints(tmp_path)] == [2, 4]


class OneRank(Agreement):
    """An agreement of this process with itself."""

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


def test_a_checkpoint_is_read_while_it_is_checked(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SHA-256 takes most of a load: it waits for the reading to begin, or this test hangs."""
    reading, sha256_of = threading.Event(), folders.sha256_of

    def slow(path: Path) -> str:
        assert not folders.holds_tensors(path.name) or reading.wait(HANG_S)
        return sha256_of(path)

    monkeypatch.setattr(folders, "sha256_of", slow)
    found = OneRank().read_checked(small / folders.name_of(2), lambda: reading.set() or "read")
    assert found == ([], "read")
    with pytest.raises(CheckpointError, match="another model"):
        OneRank().read_checked(small / folders.name_of(2), lambda: refuse("another model"))


def refuse(text: str) -> None:
    raise CheckpointError(text)


def test_what_a_damaged_checkpoint_gave_or_raised_is_void(small: Path, tmp_path: Path) -> None:
    """Damage that cannot be read is damage, not another model; damaged small files are not read."""
    copy = shutil.copytree(small / folders.name_of(2), tmp_path / "copy")
    tensors = copy / "rank-00001.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    for read in (lambda: "read", lambda: refuse("another model")):
        problems, value = OneRank().read_checked(copy, read)
        assert [p.partition(":")[0] for p in problems] == [tensors.name] and value is None
    (copy / "tensors.json").write_bytes(b"{}")
    problems, _ = OneRank().read_checked(copy, lambda: pytest.fail("it was read"))
    assert [p.partition(":")[0] for p in problems] == ["tensors.json"]


def test_state_that_a_checkpoint_lacks_is_zero_again() -> None:
    """A checkpoint from before the first update has no moments; those of a diverged run must go."""
    flat = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([flat])
    flat.grad = torch.full((3,), 1e30)
    optimizer.step()
    engine: Any = SimpleNamespace(
        runner=SimpleNamespace(optimizer=optimizer, slots=lambda: [SimpleNamespace(flat=flat)])
    )
    state.create_state(engine, ["exp_avg"], optimizer_step=0)
    kept, gone = (optimizer.state[flat][key] for key in ("exp_avg", "exp_avg_sq"))
    assert kept.count_nonzero() == 3 and gone.count_nonzero() == 0
    assert float(optimizer.state[flat]["step"]) == 0


def expect_refusal(cfg: Any, folder: Path) -> str:
    run = Run(cfg, folder)
    with pytest.raises(CheckpointError) as caught:
        run.checkpointer.restore(run.engine)
    run.close()
    return str(caught.value)


def test_checkpoint_of_another_model_is_refused_with_names_and_shapes(tmp_path: Path) -> None:
    """The message must say what differs."""
    run_on_ranks(train_and_save, 1, config("gpt2"), tmp_path, [1], 1)
    wider = config("gpt2")
    wider.model.ffn_hidden_size = 128
    message = run_on_ranks(expect_refusal, 2, wider, tmp_path)[1]
    assert "mlp.linear_fc1.bias is (256,)" in message and "(128,) in this model" in message
    assert (
        "has no head.weight and 8 more"
        in run_on_ranks(expect_refusal, 1, config("modern"), tmp_path)[0]
    )


# ---- failing saves ----------------------------------------------------------------------------------------------


def save_under_trouble(folder: Path) -> dict[str, Any]:
    """Save; save while files may not grow; save while the disk is nearly full; save again."""
    checkpoint_module.RETRY_PAUSE_S = 0.01
    logger.propagate = False
    run = Run(config("gpt2"), folder)
    run.train(0, 1)
    run.save(1)
    assert run.checkpointer.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)
    )  # what a full disk does in mid-file
    run.train(1, 2)
    run.save(2)
    write_failed = not run.checkpointer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    usage, shutil.disk_usage = (
        shutil.disk_usage,
        lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000),
    )  # type: ignore[attr-defined]
    run.train(2, 3)
    run.save(3)
    space_failed = not run.checkpointer.wait()
    shutil.disk_usage = usage
    left = sorted(path.name for path in folder.iterdir())
    history = run.train(3, 4)
    run.save(4)
    run.close()
    return {
        "write": write_failed,
        "space": space_failed,
        "left": left,
        "failed": run.checkpointer.failed_saves,
        "loss": history,
    }


def test_training_goes_on_when_the_disk_is_full(tmp_path: Path) -> None:
    """The old checkpoint stays, `latest` stays, failures are counted, and the next save works."""
    for found in run_on_ranks(save_under_trouble, 2, tmp_path):
        assert found["write"] and found["space"] and found["failed"] == 2
        assert "step-00000001" in found["left"] and "step-00000002" not in found["left"]
    assert [step for step, _ in folders.list_checkpoints(tmp_path)] == [1, 4]
    assert (tmp_path / "latest").read_text() == "step-00000004\n"
    assert (
        not list(tmp_path.glob(".step-*")) and folders.damage(tmp_path / folders.name_of(4)) == []
    )


def save_with_a_fallback(folder: Path) -> dict[str, Any]:
    """Saves whose first place is a file; then rank 1 can write nothing anywhere. Collective."""
    from pipeline.checkpoint import checkpointer as module

    module.RETRY_PAUSE_S = 0.0
    cfg = CheckpointConfig(max_failed_saves=2)
    checkpointer = Checkpointer(cfg, folder=folder / "file" / "checkpoints", fallback=folder / "other", layout=ALONE)  # fmt: skip

    def save(step: int) -> bool:
        checkpointer._last_saved = step
        checkpointer._thread = threading.Thread(target=checkpointer._write, args=(small_chunks(step), record_of(step)))  # fmt: skip
        checkpointer._thread.start()
        return checkpointer.wait()

    outcomes = [save(1)]
    no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, no_limit[1]))
    outcomes.append(save(2))
    left = sorted(path.name for path in (folder / "other").iterdir())
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
    outcomes.append(save(3))  # it worked in between: the count begins anew
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, no_limit[1]))
    outcomes.append(save(4))
    with pytest.raises(CheckpointError) as caught:
        save(5)
    resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
    return {"outcomes": outcomes, "left": left, "error": str(caught.value)}


def test_a_save_goes_to_the_fallback_and_the_run_ends_after_so_many_failures(
    tmp_path: Path,
) -> None:
    """A run that cannot save must not train for days: it ends, on every rank, and says why."""
    (tmp_path / "file").write_text("in the place of the run folder")
    found = run_on_ranks(save_with_a_fallback, 2, tmp_path)
    assert found[0] == found[1], "all ranks know the same"
    assert found[0]["outcomes"] == [True, False, True, False]
    assert found[0]["left"] == ["latest", "step-00000001"], "a failed save leaves nothing behind"
    for words in ("2 checkpoints in a row", "the last of step 5", "File too large", "fallback_dir"):
        assert words in found[0]["error"]
    places = [tmp_path / "file" / "checkpoints", tmp_path / "other"]
    assert [step for step, _ in folders.list_places(places)] == [1, 3]


def test_the_newest_checkpoint_of_both_places_is_taken(tmp_path: Path) -> None:
    places = folders.places(tmp_path / "runs" / "a", str(tmp_path / "other"))
    assert places == [tmp_path / "runs/a/checkpoints", tmp_path / "other/a/checkpoints"]
    for place, steps in zip(places, ((1, 3), (2, 3, 4))):
        for step in steps:
            (place / folders.name_of(step)).mkdir(parents=True)
    found = folders.list_places(places)
    assert [step for step, _ in found] == [1, 2, 3, 3, 4]
    assert [path.parent for step, path in found if step == 3] == [places[1], places[0]]


def save_for_ever(rank: int, world_size: int, folder: str, store: str) -> None:
    """A rank that saves and saves; rank 0 notes every save that is complete."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    root = Path(folder)
    first = max([step for step, _ in folders.list_checkpoints(root)], default=0) + 1
    checkpointer = Checkpointer(
        CheckpointConfig(keep_last=2, keep_every=10), folder=root, layout=ALONE
    )
    for step in range(first, first + 10_000):
        checkpointer._write(small_chunks(step, size=4000), record_of(step))
        if rank == 0 and checkpointer._outcome is None:
            (root / "noted").write_text(str(step))
            (root / "noted").replace(root / "completed")  # never half a note


def kill_and_check(root: Path, number: int, draw: random.Random) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = str(root / f"store-{number}")
    ranks = [
        context.Process(target=save_for_ever, args=(r, 2, str(root), store), daemon=True)
        for r in range(2)
    ]
    for process in ranks:
        process.start()
    before = read_completed(root)
    deadline = time.monotonic() + HANG_S
    while read_completed(root) <= before and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.15))
    for process in draw.sample(ranks, 2):
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    completed = read_completed(root)
    assert completed > before
    found = folders.list_checkpoints(root)
    assert [folders.damage(path) for _, path in found] == [[]] * len(found), (
        "a half-written checkpoint has a final name"
    )
    step, newest = found[-1]
    assert step >= completed
    assert float(CheckpointTensors(newest).tensor("weights/a")[0, 0]) == step
    assert (root / "latest").read_text().strip() in {path.name for _, path in found}


def read_completed(root: Path) -> int:
    try:
        return int((root / "completed").read_text())
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_at_any_moment_leaves_the_last_completed_save(kills: int, tmp_path: Path) -> None:
    """kill -9 of both ranks at random moments around saves; each restart finds a whole one, as new as promised."""
    draw = random.Random(kills)
    for number in range(kills):
        kill_and_check(tmp_path, number, draw)


# ---- keeping ----------------------------------------------------------------------------------------------------


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
    with pytest.raises(CheckpointError, match="is no checkpoint"):
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


def write_hole(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    chunks = small_chunks(1) if dist.get_rank() == 0 else []
    with pytest.raises(CheckpointError, match="do not fill its .40, 30.: a hole"):
        write(chunks, folder, ranks=Agreement(dist.group.WORLD))
    return "refused"


def test_a_tensor_with_a_hole_is_not_written(tmp_path: Path) -> None:
    """A rank that forgets its part must fail the save, not leave zeros."""
    assert run_on_ranks(write_hole, 2, tmp_path / "x") == ["refused", "refused"]


def test_host_copy_reuses_its_memory() -> None:
    """Pages are faulted in, or pinned, once: that is most of the stall of a first save."""
    fragment = Fragment("a", Partition.of((4, 5)), 3, {"weight": torch.arange(9.0)}, True)
    copies = HostCopy()
    first, second = copies.take([fragment]), copies.take([fragment])
    assert [chunk.data.data_ptr() for chunk in first] == [chunk.data.data_ptr() for chunk in second]
    assert [(chunk.offsets, chunk.data.tolist()) for chunk in second] == [
        ((0, 3), [[0.0, 1.0]]), ((1, 0), [[2.0, 3.0, 4.0, 5.0, 6.0]]), ((2, 0), [[7.0, 8.0]]),
    ]  # fmt: skip


def test_host_copy_by_several_threads_is_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk once, and by as many threads as were given: one core does not reach the memory's speed."""
    import threading

    from torch import Tensor

    fragments = [
        Fragment(f"f{number}", Partition.of((300, 40)), 0, {"weight": torch.rand(12_000)}, True)
        for number in range(8)
    ]
    meet, copy = threading.Barrier(2, timeout=20), Tensor.copy_

    def copy_together(self: Tensor, source: Tensor, **kwargs: object) -> Tensor:
        meet.wait()  # breaks where one thread copies one after the other
        return copy(self, source, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Tensor, "copy_", copy_together)
    copies = HostCopy(num_threads=2).take(fragments)
    monkeypatch.undo()
    assert [chunk.name for chunk in copies] == [f"weights/f{number}" for number in range(8)]
    for fragment, chunk in zip(fragments, copies):
        assert torch.equal(chunk.data.reshape(-1), fragment.views["weight"])
