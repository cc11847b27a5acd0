"""The campaign itself: its list is that of its seed, a trace is found, and a short slice of it is survived."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import campaign
from tests.support.campaign_faults import KINDS
from tests.support.campaign_run import CampaignError, Progress

ROOT = Path(__file__).resolve().parents[1]


def row(step: int, **changes: object) -> dict:
    return {"step": step, "train/loss": 1.0 / step, "train/grad_norm": 0.5, "train/lr": 0.1, "data/sample_hash": f"{step:x}", "tokens": step, **changes}  # fmt: skip


def test_a_seed_has_one_list_in_which_no_kind_is_rare() -> None:
    """A fault that was not survived can be struck again."""
    drawn = campaign.draw(7, 3 * len(KINDS), list(KINDS))
    assert drawn == campaign.draw(7, 3 * len(KINDS), list(KINDS))
    assert drawn != campaign.draw(8, 3 * len(KINDS), list(KINDS))
    assert drawn[:5] == campaign.draw(7, 5, list(KINDS))
    for first in range(0, len(drawn), len(KINDS)):
        assert {fault.kind for fault in drawn[first : first + len(KINDS)]} == set(KINDS)


def test_a_lost_step_and_another_number_are_traces() -> None:
    """Steps done twice count twice: the lost half of a step may be right the second time."""
    whole = [row(step) for step in (1, 2, 3)]
    assert campaign.differences([*whole[:2], *whole[1:]], whole, 3) == []
    assert campaign.differences([whole[0], whole[2]], whole, 3) == ["step 2 was never logged"]
    for key in campaign.NUMBERS:
        (found,) = campaign.differences([*whole, row(2, **{key: 0.25})], whole, 3)
        assert found.startswith("step 2: ")


class Dead:
    """A run whose every start ends at once."""

    starts = 0

    def start(self) -> None:
        self.starts += 1

    def has_ended(self) -> bool:
        return True

    def log(self) -> str:
        return "it says why"


def test_a_run_that_does_not_go_on_ends_the_campaign(tmp_path: Path) -> None:
    """Starting it again for ever would hide a run that each fault ends."""
    run = Dead()
    with pytest.raises(CampaignError, match="ended at step 0\nit says why"):
        campaign.advance(run, Progress(tmp_path), to=1, max_starts=2)  # type: ignore[arg-type]
    assert run.starts == 2


def test_half_a_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    """The run writes while the campaign reads, and a killed one leaves half a line."""
    progress = Progress(tmp_path)
    assert progress.read() == 0
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step":1,"train/loss":2}\n{"step":2,"train/l')
    assert progress.read() == 1
    with file.open("a") as lines:
        lines.write('\n{"step":2,"train/loss":1}\n')
    assert progress.read() == 2
    assert [r["step"] for r in progress.rows] == [1, 2]


@pytest.mark.slow
def test_a_slice_of_the_campaign_is_survived(tmp_path: Path) -> None:
    """Cheap kinds; `make soak` takes all of them for hours."""
    kinds = "kill of a rank,link cut for a moment,clock jump,checkpoint file flipped"
    words = ["--faults", "4", "--seed", "2", "--kinds", kinds, "--folder", str(tmp_path / "c")]
    command = [sys.executable, "-m", "tests.campaign", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 faults survived (seed 2)" in done.stdout
