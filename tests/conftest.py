"""What every test process needs: one thread a process, byte code, no network, tests that fit the machine."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import preloaded, ranks
from tests.support.device import has_device, hide_devices
from tests.support.left_out import leave_out
from tests.support.preloaded import Preloaded

if TYPE_CHECKING:
    from pipeline.rehearsal.dry_run import RankProcess

leave_out()
hide_devices()
# A container's environment may forbid byte code. A fresh environment then never has any, and each
# process that a test starts compiles all of DeepSpeed and megatron-core: 12.5 s of CPU instead of 6.4.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests share few cores with their own ranks
# In the background (nohup, `&`, many CI runners) HUP and INT are ignored from the start, and so they
# would be in every program that a test starts. A handler goes on ignoring them here; a program that
# is started has the default.
for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)
# The files that take longest beside Slurm's, in the fast suite or in the slow one.
LONG = (
    "test_talk.py",
    "test_train.py",
    "test_equivalence.py",
    "test_text_samples.py",
    "test_trainer.py",
)
RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for name in RANK_NAMES:  # of a launcher above
    os.environ.pop(name, None)
os.environ["WANDB_MODE"] = "offline"
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Before xdist starts a worker: ranks of all workers are forked from one server, programs from another."""
    node.workerinput["ranks"] = ranks.share()
    node.workerinput["programs"] = str(preloaded.shared().address.parent)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        ranks.join(config.workerinput["ranks"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of the files, and no tests marked gpu where torch sees no device."""
    # Slurm's mostly wait, for minutes, and what is long ends late: at the end nothing else is left
    # to be done meanwhile.
    items.sort(key=lambda item: (not item.get_closest_marker("slurm"), item.path.name not in LONG))
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not has_device():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """What all test modules have loaded stays: without this a full collection takes 0.4 s of CPU."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def messages_reach_caplog() -> None:
    """A command that ran in this process, in a test or a fixture, turned `propagate` off."""
    logger = logging.getLogger("pretrain")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture(autouse=True)
def no_rank_is_left_behind() -> Iterator[None]:
    """Programs of later tests would take themselves for ranks: of a Slurm job each was a run of its own."""
    yield
    left = {name: os.environ.pop(name) for name in RANK_NAMES if name in os.environ}
    assert left == {}, "a test, or what it called, made this process a rank for good"


@pytest.fixture(scope="session")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Preloaded]:
    """Its `python` runs modules of programs that train without the seconds of their imports."""
    if hasattr(request.config, "workerinput"):
        server = Preloaded(Path(request.config.workerinput["programs"]))
        server.wait()
        yield server
    else:
        with Preloaded(tmp_path_factory.mktemp("preloaded")) as server:
            yield server


@pytest.fixture(scope="session")
def rank_process() -> Iterator[RankProcess]:
    """Rehearses ranks of large jobs (pipeline/rehearsal): what they import takes longer than most of them."""
    from pipeline.rehearsal.dry_run import RankProcess

    with RankProcess() as process:
        yield process
