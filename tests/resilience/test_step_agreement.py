"""One all-reduce a step: what one rank knows, all know, at once or a step later."""

import math

import pytest
import torch

from pipeline.resilience.step_agreement import StepAgreement
from tests.support.ranks import run_on_ranks


def _agree(is_late: bool) -> list[tuple]:
    rank = torch.distributed.get_rank()
    agreement = StepAgreement(torch.device("cpu"))
    agreement.is_late = is_late
    no, half = torch.tensor(False), torch.tensor(0.5)
    found = [
        agreement.agree(4, loss=torch.tensor(2.5), grad_norm=half, skipped=no, notice=False),
        agreement.agree(
            5, loss=torch.tensor(math.nan if rank else 2.5), grad_norm=torch.tensor(math.inf),
            skipped=torch.tensor(rank == 1), notice=rank == 1,
        ),
        agreement.drain(),
        agreement.drain(),
    ]  # fmt: skip
    return [v and (v.step, str(v.loss), str(v.grad_norm), v.skipped, v.notice) for v in found]


@pytest.mark.parametrize("is_late", [False, True])
def test_what_one_rank_knows_all_ranks_know(is_late):
    """Late, as on CUDA: each answer comes one step later, the last by drain."""
    known = [(4, "2.5", "0.5", False, False), (5, "nan", "nan", True, True)]
    expected = [None, *known, None] if is_late else [*known, None, None]
    assert run_on_ranks(_agree, 2, is_late) == [expected, expected]
