"""Waiting for collectives that were launched earlier, where a hanging run's page sees it."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist


def wait_for(works: Iterable[dist.Work]) -> None:
    """Until they are done; on CUDA, until later kernels come after them.

    Work.wait is C++ and no frame of the stack: without this one, a rank that waits in a collective
    would seem to be busy, and be taken for the one that holds the others up (hang_page.PLACES).
    """
    for work in works:
        work.wait()
