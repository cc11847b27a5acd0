"""A step with bad numbers or a spike leaves no trace in the weights, whatever the layout."""

from typing import Any

import pytest
import torch

from tests.support import layouts
from tests.support.ranks import run_on_ranks

CASES: dict[int, list[dict[str, Any]]] = {
    1: [{"zero": 0}, {"zero": 1}, {"zero": 2, "precision": "bf16"}, {"zero": 3}],
    2: [{"pp": 2}, {"pp": 2, "schedule": "dualpipev"}, {"tp": 2}, {"zero": 3}],
}


def disturbed(cases: list[dict[str, Any]]) -> list[list[tuple[bool, bool, bool]]]:
    """(skipped, weights moved, loss is finite) of five steps a case: good, NaN mask, good, limit below, limit above."""
    from pipeline.config.run_shape import derive
    from pipeline.distributed.layout import connect
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.training.build import build_engine

    found = []
    for case in cases:
        cfg, ranks = layouts.config(**case), ranks_from_environment()
        shape = derive(cfg, world_size=ranks.world_size, tokenizer_vocab_size=layouts.VOCAB)
        layout = connect(ranks, shape.sizes)
        engine = build_engine(cfg, shape, layout)
        steps = layouts.batches(masked=True)[:5]
        steps[1]["mask"] = torch.full_like(steps[1]["mask"], float("nan"))
        limits = [float("inf"), float("inf"), float("inf"), 1.0, 100.0]
        rows = []
        for number, (step, max_loss) in enumerate(zip(steps, limits)):
            before = weights(engine)
            result = engine.train_step(
                layouts.rank_batches(step, shape, layout), step=number, max_loss=max_loss
            )
            moved = not all(torch.equal(a, b) for a, b in zip(before, weights(engine)))
            rows.append((bool(result.skipped), moved, bool(torch.isfinite(result.loss))))
        found.append(rows)
        layouts.reset_parallel_state()
    return found


def weights(engine: Any) -> list[torch.Tensor]:
    from pipeline.engine import state

    return [fragment.views["weight"].clone() for fragment in state.fragments(engine)]


@pytest.mark.parametrize("world_size", CASES)
def test_bad_steps_leave_no_trace(world_size):
    applied, nan, spike = (False, True, True), (True, False, False), (True, False, True)
    for ranks in run_on_ranks(disturbed, world_size, CASES[world_size]):
        for case, rows in zip(CASES[world_size], ranks):
            assert rows == [applied, nan, applied, spike, applied], case
