"""Saves that fail or are killed: the old checkpoint stays, the run goes on, the fallback is used."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.checkpoint import checkpointer as checkpoint_module
from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.checkpointer import Checkpointer
from pipeline.checkpoint.tensors import CheckpointTensors
from pipeline.config.operation import CheckpointConfig
from pipeline.errors import CheckpointError
from pipeline.log import logger
from tests.support.checkpoint_runs import ALONE, Run, record_of, small_chunks
from tests.support.layouts import config
from tests.support.ranks import forked_from_our_server, run_on_ranks
from tests.support.waiting import names_under, wait_until


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
    store = str(root / f"store-{number}")
    with forked_from_our_server() as context:
        ranks = [
            context.Process(target=save_for_ever, args=(r, 2, str(root), store), daemon=True)
            for r in range(2)
        ]
        for process in ranks:
            process.start()
    before = read_completed(root)
    wait_until(lambda: read_completed(root) > before)
    known, number = names_under(root), draw.randint(0, 9)
    wait_until(lambda: len(names_under(root) - known) >= number)
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
