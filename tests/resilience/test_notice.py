"""A notice to one rank, in any phase, makes all ranks save and leave after the same step; nothing is done twice."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.errors import CheckpointError
from tests.support import layouts
from tests.support.corpus import make_tokenizer
from tests.support.ranks import run_on_ranks
from tests.support.token_dataset import write_dataset

STEPS = 12
SETTINGS = [
    "name=a", "model.num_layers=2", "model.hidden_size=32", "model.max_seq_len=32", "schedule.warmup_steps=2",
    f"training.total_steps={STEPS}", "training.global_batch_size=4", "training.micro_batch_size=2",
    "training.eval_every=2", "training.eval_sequences=4", "training.precision=fp32", "tracking.log_every=1",
    "tracking.wandb=disabled", "checkpoint.save_every=2",
]  # fmt: skip


def start(folder: Path, phase: str, number: int) -> int:
    """One start of the run on this rank; rank 1 gets USR2 when it enters `phase`. The step at which it left."""
    from pipeline import train
    from pipeline.distributed import layout as layout_module
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.resilience import notice
    from pipeline.resilience.clock import Clock
    from pipeline.training import startup

    layout_module.disconnect = layouts.reset_parallel_state  # the process group is the test's
    notice.install_handlers()
    ranks = ranks_from_environment()
    entered = []

    class Watched(Clock):
        def enter(self, entering: str, step: int) -> None:
            super().enter(entering, step)
            entered.append(entering)
            if entering == phase and ranks.global_rank == 1 and entered.count(phase) == number:
                os.kill(os.getpid(), signal.SIGUSR2)

    clock = Watched()
    settings = [f"data.path={folder}/data", f"runs_dir={folder}/runs", *SETTINGS]
    cfg = cli.compose(PretrainConfig, settings, config="pretrain")
    begun = startup.check(cfg, world_size=ranks.world_size)
    if ranks.is_main:
        startup.begin(cfg, begun, ranks)
    train.train(cfg, begun.shape, ranks, run_dir=begun.run_dir, clock=clock)
    return clock.now.step


def test_notice_in_any_phase_is_obeyed_after_the_next_step(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json", vocab_size=300).read_bytes()
    for split, stride in (("train", 7), ("validation", 11)):
        write_dataset(
            tmp_path / "data" / split,
            [np.arange(2048) * stride % 300],
            vocab_size=300,
            tokenizer=tokenizer,
        )
    left = [run_on_ranks(start, 2, tmp_path, *when) for when in NOTICES]
    assert left == [[step, step] for _, _, step in EXPECTED]
    rows = [
        json.loads(line)
        for line in (tmp_path / "runs" / "a" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, STEPS + 1))
    assert (tmp_path / "runs" / "a" / "DONE").read_text() == f"{STEPS}\n"


# (phase, which time it is entered in the start, step at which the start ends). The start that goes on at step 4 evaluates
# it first: the one before left between its save and its evaluation.
EXPECTED = [
    ("start-up", 1, 1), ("data", 2, 3), ("train", 1, 4), ("evaluation", 1, 5), ("save", 1, 7), ("none", 1, STEPS)
]  # fmt: skip
NOTICES = [(phase, number) for phase, number, _ in EXPECTED]


def finish_after_failed_saves(folder: Path) -> tuple[str, int]:
    """The end of a run whose last save fails twice, and may not fail more often."""
    from pipeline.training.trainer import Trainer

    tries: list[int] = []

    def wait() -> bool:
        tries.append(1)
        if len(tries) == 2:
            raise CheckpointError("2 checkpoints in a row could not be written")
        return False

    trainer = SimpleNamespace(
        state=SimpleNamespace(step=5), shape=SimpleNamespace(total_steps=5), run_dir=folder, save=lambda: None,
        checkpoints=SimpleNamespace(wait=wait), agreement=SimpleNamespace(drain=lambda: None),
    )  # fmt: skip
    trainer.save_and_wait = lambda: Trainer.save_and_wait(trainer)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError) as caught:
        Trainer.finish(trainer)  # type: ignore[arg-type]
    return str(caught.value), len(tries)


def test_a_run_whose_last_checkpoint_failed_is_not_done(tmp_path):
    ((message, tries),) = run_on_ranks(finish_after_failed_saves, 1, tmp_path)
    assert "could not be written" in message and tries == 2
    assert not (tmp_path / "DONE").exists()
