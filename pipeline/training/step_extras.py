"""What a logged step says beyond loss and speed."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.config.choices import OnCorrupt
from pipeline.config.pretrain import PretrainConfig
from pipeline.data.loader import Loader
from pipeline.distributed.layout import ParallelLayout
from pipeline.engine.engine import Engine
from pipeline.tracking.routing import routing_values


class StepExtras:
    """Values by metric name, on logged steps."""

    def __init__(
        self, cfg: PretrainConfig, *, loader: Loader, engine: Engine, layout: ParallelLayout
    ) -> None:
        self._loader, self._engine, self._layout = loader, engine, layout
        self._moe = cfg.model.moe
        self._every = cfg.tracking.log_every
        self._hashes = cfg.tracking.sample_hash and layout.ranks.is_main
        self._counts = cfg.data.on_corrupt is OnCorrupt.skip

    def of(self, step: int) -> dict[str, Any]:
        """Of the step that is done. Collective where all ranks count: call on every rank."""
        if step % self._every:
            return {}
        values: dict[str, Any] = {}
        if self._hashes:
            values["data/sample_hash"] = self._loader.sample_hash
        if self._counts:
            values["data/corrupt_samples"] = self._corrupt_samples()
        if self._moe.num_experts:
            values |= routing_values(self._engine.routing(), self._moe)
        return values

    def _corrupt_samples(self) -> int:
        """Samples left out so far, all data-parallel ranks. Collective."""
        count = torch.tensor(self._loader.corrupt_samples, device=self._layout.device)
        torch.distributed.all_reduce(count, group=self._layout.data.group)
        return int(count)
