"""After its first step a run does not wait for half an hour for a rank that is gone."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from tests.support.layouts import VOCAB, batches, config, rank_batches
from tests.support.ranks import run_on_ranks


def timeouts(run_dir: Path) -> tuple[set[float], set[float], float]:
    """Seconds a collective may take: before a step that is traced, after it, and on the host."""
    from pipeline.config.run_shape import derive
    from pipeline.distributed.layout import connect
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.training.build import build_watched_engine

    cfg = config(zero=1)
    cfg.training.profile_steps = [1, 1]
    ranks = ranks_from_environment()
    shape = derive(cfg, world_size=ranks.world_size, tokenizer_vocab_size=VOCAB)
    layout = connect(ranks, shape.sizes)
    engine = build_watched_engine(cfg, shape, layout, run_dir=run_dir)

    def of(group: Any) -> float:
        options = group._get_backend(torch.device("cpu")).options
        return timedelta.total_seconds(options._timeout)

    groups = (layout.data.group, layout.tensor.group)
    before = set(map(of, groups))
    engine.train_step(rank_batches(batches()[0], shape, layout), step=0)
    return before, set(map(of, groups)), of(layout.host_group)


def test_groups_of_devices_wait_less_after_a_step_and_the_host_does_not(tmp_path: Path) -> None:
    """On the host ranks wait for a checkpoint to be written, which may take longer than a step."""
    before, after, host = run_on_ranks(timeouts, 2, tmp_path)[0]
    assert before == {1800.0} and after == {900.0} and host >= 1800.0
    files = sorted(path.name for path in tmp_path.glob("profiles/*/*"))
    assert files == ["rank-00000.trace.json.gz", "rank-00001.trace.json.gz"]
