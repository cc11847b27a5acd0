"""Heads that a model must grow are found, and the curve over its checkpoints says when they came."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.choices import Normalization, Position, Precision
from pipeline.config.model import ModelConfig
from pipeline.config.operation import CheckpointConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.training import OptimizerConfig, ScheduleConfig, TrainingConfig
from tests.support.checkpoint_runs import Run
from tests.support.exported import tokenizer_file
from tests.support.layouts import VOCAB, reset_parallel_state
from tests.support.ranks import run_on_ranks

SEQ_LEN, ROWS, STEPS, SAVED = 64, 32, 900, (0, 300, 600, 900)


def repeats(generator: torch.Generator) -> Any:
    """Random tokens that begin again after 8 to 32; only what the repetition tells is learned."""
    period = torch.randint(8, SEQ_LEN // 2 + 1, (ROWS, 1), generator=generator)
    ids = torch.randint(0, VOCAB, (ROWS, SEQ_LEN), generator=generator)
    places = torch.arange(SEQ_LEN + 1)[None]
    stream = ids.gather(1, places % period)
    mask = (places[:, 1:] >= period).float()
    return SimpleNamespace(
        tokens=stream[:, :-1],
        labels=stream[:, 1:],
        loss_mask=mask,
        document_ids=None,
        positions=None,
        images=None,
        patch_ids=None,
    )


def curve(folder: Path) -> np.ndarray:
    """(checkpoints, 2, heads) induction scores over a small run."""
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.probe import ProbeConfig, look_into

    cfg = PretrainConfig(
        name="repeats",
        model=ModelConfig(
            name="two-blocks", num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=16,
            max_seq_len=SEQ_LEN, position=Position.rope, normalization=Normalization.rmsnorm, bias=False,
            init_std=0.1,
        ),
        optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=30),
        checkpoint=CheckpointConfig(keep_last=len(SAVED)),
        training=TrainingConfig(
            total_steps=STEPS, global_batch_size=ROWS, micro_batch_size=ROWS, precision=Precision.fp32
        ),
    )  # fmt: skip
    run = Run(cfg, folder, attachments={"tokenizer.json": tokenizer_file(folder).read_bytes()})
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS + 1):
        if step in SAVED:
            run.save(step)
            run.checkpointer.wait()
        if step < STEPS:
            run.engine.train_step([repeats(generator)], step=step)
    run.close()
    asked = ProbeConfig(checkpoint=str(folder), prompt="t1 t2", curve=True)
    found = look_into(asked, ranks_from_environment())["curve"]
    reset_parallel_state()
    assert found["steps"] == list(SAVED)
    return np.array(found["induction"])


@pytest.mark.slow
def test_induction_heads_are_born_in_the_second_block(tmp_path: Path) -> None:
    """Above 0.5, where a random model is below 0.1; one block alone cannot have them."""
    [scores] = run_on_ranks(curve, 1, tmp_path)
    best = [float(score.max()) for score in scores]
    assert max(best[:2]) < 0.1 and min(best[2:]) > 0.5, best  # between steps 300 and 600
    assert scores[-1][1].max() > scores[-1][0].max() + 0.3, scores[-1]
