"""Runs that save and resume, on any layout: shared by the tests of checkpoint, export, generate and evaluate."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from pipeline.checkpoint.adapters import as_json
from pipeline.checkpoint.checkpointer import Checkpointer
from pipeline.checkpoint.record import CheckpointRecord, RunRecord
from pipeline.cli import to_dict
from pipeline.config.operation import CheckpointConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import derive
from pipeline.distributed.layout import connect
from pipeline.distributed.ranks import Ranks, ranks_from_environment
from pipeline.model.fragments import Chunk
from tests.support.layouts import BATCH, SEQ_LEN, VOCAB, batches, rank_batches, reset_parallel_state

History = list[tuple[float, float]]
ALONE: Any = SimpleNamespace(ranks=Ranks(0, 1, 0, 1, "here"))
"""The layout of one process, as far as a checkpointer asks."""


class Run:
    """An engine and its checkpointer; ends with `close`, so that one process can hold several layouts in turn."""

    def __init__(
        self,
        cfg: PretrainConfig,
        folder: Path,
        *,
        attachments: dict[str, bytes] | None = None,
        base: Path | None = None,
        ends: dict[str, int] | None = None,
    ) -> None:
        from pipeline.training.build import build_engine
        from pipeline.training.initial_weights import load_base

        ranks = ranks_from_environment()
        self.cfg, self.ends = cfg, ends or {}
        self.shape = derive(cfg, world_size=ranks.world_size, tokenizer_vocab_size=VOCAB)
        self.layout = connect(ranks, self.shape.sizes)
        self.engine = build_engine(cfg, self.shape, self.layout)
        self.checkpointer = Checkpointer(
            cfg.checkpoint, folder=folder, layout=self.layout, attachments=attachments
        )
        self.base = None if base is None else load_base(self.engine, base)
        self.steps = batches()

    def train(self, first: int, last: int) -> History:
        """[(loss, gradient norm)] of steps first .. last - 1."""
        history = []
        for step in range(first, last):
            mine = rank_batches(self.steps[step], self.shape, self.layout)
            result = self.engine.train_step(mine, step=step)
            history.append((float(result.loss), float(result.grad_norm)))
        return history

    def save(self, step: int) -> None:
        """Start writing a checkpoint."""
        record = RunRecord(
            state={"step": step, "tokens_seen": step * BATCH * SEQ_LEN},
            config=to_dict(self.cfg),
            **self.ends,
            base=as_json(self.base),
        )
        self.checkpointer.save(self.engine, step=step, run=record)

    def close(self) -> None:
        """Make room for the next layout."""
        self.checkpointer.wait()
        reset_parallel_state()


def learn(run: Run, steps: Iterable[dict[str, torch.Tensor]]) -> float:
    """Train on steps that are made as they come, save what was learned and close; the last loss. Collective."""
    for done, step in enumerate(steps):
        mine = rank_batches(step, run.shape, run.layout)
        last = float(run.engine.train_step(mine, step=done).loss)
    run.save(done + 1)
    run.close()
    return last


def train_and_save(
    cfg: PretrainConfig, folder: Path, save_at: list[int], last: int, **kwargs: Any
) -> History:
    """Train from the start to `last`, saving at some steps. Collective."""
    run, history, done = Run(cfg, folder, **kwargs), [], 0
    for step in save_at:
        history += run.train(done, step)
        run.save(step)
        done = step
    history += run.train(done, last)
    run.close()
    return history


def resume(
    cfg: PretrainConfig,
    folder: Path,
    last: int,
    *,
    save_to: Path | None = None,
    base: Path | None = None,
) -> History:
    """Restore the newest checkpoint and train on to `last`; save what was restored once more, elsewhere. Collective."""
    run = Run(cfg, folder, base=base)
    record = run.checkpointer.restore(run.engine)
    assert record is not None
    if save_to is not None:
        again = Checkpointer(CheckpointConfig(), folder=save_to, layout=run.layout)
        again.save(
            run.engine,
            step=record.step,
            run=RunRecord(state=record.state, config=record.config),
        )
        assert again.wait()
    history = run.train(record.step, last)
    run.close()
    return history


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
