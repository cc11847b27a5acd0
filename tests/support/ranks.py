"""run_on_ranks: run a function on N gloo ranks, forked from a server that has torch and the libraries loaded.

Importing torch, DeepSpeed and megatron-core takes seconds of CPU; the fork server pays it once a test session, so a
four-rank test costs what it computes. xdist's workers share one, started by the process above them. It is the ranks'
own: Python has one a process, which the first to ask for it fills, and where data_prep's workers came first every rank
of the session imported everything itself.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from typing import Any
from unittest.mock import patch

from tests.support.waiting import HANG_S

PRELOAD = ["torch", "torch.distributed", "tests.support.preload"]
SERVER = forkserver.ForkServer()
SERVER.set_forkserver_preload(PRELOAD)
_own_warnings: list[Any] | None = None


def share() -> str:
    """Start SERVER in the process that starts pytest's workers; its address, for join() in each of them.

    What ranks print goes nowhere; of a server of a worker's own it went into a file that pytest throws away.
    """
    resource_tracker.ensure_running()
    nothing, kept = os.open(os.devnull, os.O_WRONLY), [os.dup(1), os.dup(2)]
    try:
        os.dup2(nothing, 1), os.dup2(nothing, 2)
        SERVER.ensure_running()
    finally:
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        for descriptor in (nothing, *kept):
            os.close(descriptor)
    return SERVER._forkserver_address  # type: ignore[attr-defined]


def join(address: str) -> None:
    """Take the server of the process above for SERVER; it ends as that process does."""
    SERVER._forkserver_address = address  # type: ignore[attr-defined]
    SERVER._forkserver_alive_fd = os.open(os.devnull, os.O_WRONLY)  # type: ignore[attr-defined]
    SERVER.ensure_running = resource_tracker.ensure_running  # type: ignore[method-assign]


def fork_from_here() -> None:
    """For a process from SERVER that is about to run pytest: its ranks are forked from it, without a second server."""
    global _own_warnings
    _own_warnings = warnings.filters[:]


@contextmanager
def forked_from_our_server() -> Iterator[Any]:
    """multiprocessing's context, whose processes start from SERVER while this is open."""
    if _own_warnings is not None:
        yield multiprocessing.get_context("fork")
        return
    with patch.object(forkserver, "connect_to_new_process", SERVER.connect_to_new_process):
        yield multiprocessing.get_context("forkserver")


def run_on_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = HANG_S
) -> list[Any]:
    """[fn(*args) on rank r for r in range(world_size)], each rank in a process of its own under one gloo group.

    Args:
        fn: a module-level function; its result must pickle.
        timeout_s: ranks that run longer are killed and the test fails.
    Raises:
        AssertionError: a rank raised (its traceback is the message), died, or ran out of time.
    """
    with tempfile.TemporaryDirectory() as folder, forked_from_our_server() as context:
        queue = context.Queue()
        processes = [
            context.Process(
                target=_rank_main, args=(fn, rank, world_size, folder, args, queue), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            results = _collect(queue, processes, world_size, timeout_s)
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()
    return [results[rank] for rank in range(world_size)]


def _collect(queue: Any, processes: list, world_size: int, timeout_s: float) -> dict[int, Any]:
    import queue as queue_module
    import time

    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < world_size:
        try:
            rank, error, value = queue.get(timeout=1.0)
        except queue_module.Empty:
            dead = [
                r
                for r, p in enumerate(processes)
                if not p.is_alive() and r not in results and p.exitcode != 0
            ]
            assert not dead, (
                f"ranks {dead} died with exit codes {[processes[r].exitcode for r in dead]}"
            )
            assert time.monotonic() < deadline, (
                f"ranks {sorted(set(range(world_size)) - set(results))} ran over {timeout_s} s"
            )
            continue
        assert error is None, f"rank {rank} raised:\n{error}"
        results[rank] = value
    return results


def _rank_main(
    fn: Callable, rank: int, world_size: int, folder: str, args: tuple, queue: Any
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", OMP_NUM_THREADS="1",
    )  # fmt: skip
    if _own_warnings is not None:
        warnings.filters[:] = _own_warnings  # to pytest they are errors, to ranks from SERVER not
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
        value = fn(*args)
        if dist.is_initialized():  # a whole training run tears its groups down itself
            dist.barrier()
        queue.put((rank, None, value))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
    finally:
        queue.close()
        queue.join_thread()
        os._exit(0)  # no atexit handlers of libraries, no waiting for peers that failed
