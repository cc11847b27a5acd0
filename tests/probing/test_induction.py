"""Heads that a model must grow are found, and the curve over its checkpoints says when they came."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.choices import Decay, Normalization, Precision
from pipeline.config.model import ModelConfig
from pipeline.config.operation import CheckpointConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.training import OptimizerConfig, ScheduleConfig, TrainingConfig
from pipeline.model.fragments import WEIGHT
from tests.support.checkpoint_runs import Run
from tests.support.exported import tokenizer_file
from tests.support.layouts import VOCAB, reset_parallel_state
from tests.support.ranks import run_on_ranks

SEQ_LEN, ROWS, SAVED = 64, 32, (0, 150, 300, 450, 600)


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


def silence_mlps(engine: Any) -> None:
    """Both matrices at zero: neither has a gradient then, so they stay there."""
    for fragment in engine.fragments():
        if ".mlp." in fragment.name:
            fragment.views[WEIGHT].zero_()
    engine.publish_weights()


def curve(folder: Path) -> tuple[np.ndarray, list[float]]:
    """(checkpoints, 2, heads) induction scores over a small run; what its MLPs add at the end."""
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.probe import ProbeConfig, look_into

    cfg = PretrainConfig(
        name="repeats",
        model=ModelConfig(
            name="two-blocks", num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=4,
            max_seq_len=SEQ_LEN, normalization=Normalization.rmsnorm, bias=False, init_std=0.1,
        ),
        optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.0),
        schedule=ScheduleConfig(decay=Decay.constant, warmup_steps=30),
        checkpoint=CheckpointConfig(keep_last=len(SAVED)),
        training=TrainingConfig(
            total_steps=SAVED[-1], global_batch_size=ROWS, micro_batch_size=ROWS, precision=Precision.fp32
        ),
    )  # fmt: skip
    run = Run(cfg, folder, attachments={"tokenizer.json": tokenizer_file(folder).read_bytes()})
    silence_mlps(run.engine)
    generator = torch.Generator().manual_seed(1)
    for step in range(SAVED[-1] + 1):
        if step in SAVED:
            run.save(step)
            run.checkpointer.wait()
        if step < SAVED[-1]:
            run.engine.train_step([repeats(generator)], step=step)
    run.close()
    asked = ProbeConfig(checkpoint=str(folder), prompt="t1 t2", curve=True)
    found = look_into(asked, ranks_from_environment())
    reset_parallel_state()
    assert found["curve"]["steps"] == list(SAVED)
    return np.array(found["curve"]["induction"]), found["averages"]["mlp"]


@pytest.mark.slow
def test_induction_heads_are_born_in_the_second_block(tmp_path: Path) -> None:
    """Attention alone, two blocks: above 0.5, where a random model is below 0.1."""
    [(scores, of_mlps)] = run_on_ranks(curve, 1, tmp_path)
    best = [float(score.max()) for score in scores]
    assert of_mlps == [0.0, 0.0]
    assert max(best[:2]) < 0.1 and min(best[3:]) > 0.5, best  # between steps 150 and 450
    assert scores[-1][1].max() > scores[-1][0].max() + 0.3, scores[-1]
