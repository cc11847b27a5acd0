"""Which checkpoint of a run is the best so far, by its held-out loss.

results of an evaluation --is_beaten--> save --mark--> checkpoints/best, which pruning spares
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.agreement import Agreement
from pipeline.log import logger
from pipeline.resilience.bookkeeping import bookkeeping

if TYPE_CHECKING:
    from pipeline.distributed.layout import ParallelLayout
    from pipeline.evaluation.perplexity import EvalResult


class BestCheckpoint:
    """The lowest held-out loss of the run, also of its earlier starts; alike on every rank."""

    def __init__(self, places: Sequence[Path], layout: ParallelLayout) -> None:
        """Collective: call on every rank.

        Args:
            places: folders that may hold the run's checkpoints.
        """
        self._places, self._layout = places, layout
        self._loss = Agreement(layout.host_group).on_main(lambda: folders.best_loss(places))

    def is_beaten(self, results: Mapping[str, EvalResult]) -> bool:
        """Whether an evaluation is better than the best; one that is no number never is."""
        loss = mean_loss(results)
        return loss < (math.inf if self._loss is None else self._loss)

    def mark(self, step: int, results: Mapping[str, EvalResult]) -> None:
        """The checkpoint of this step, which is on the disk, is the best now."""
        self._loss = mean_loss(results)
        if self._layout.ranks.is_main:
            with bookkeeping("checkpoints/best"):
                folders.mark_best(self._places, step, self._loss)
            logger.info("step %d is the best so far: held-out loss %.4f", step, self._loss)


def mean_loss(results: Mapping[str, EvalResult]) -> float:
    """Over the datasets, each counting alike; NaN where there are none."""
    losses = [result.loss for result in results.values()]
    return sum(losses) / len(losses) if losses else math.nan
