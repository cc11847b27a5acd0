"""The account of a run's time, over its restarts."""

import pytest

from pipeline.resilience.clock import Clock
from pipeline.resilience.goodput import Goodput, summary


def attempt(start, end, first, last, **seconds):
    named = {name.replace("_", "-"): value for name, value in seconds.items()}
    return {
        "started_at": start,
        "updated_at": end,
        "first_step": first,
        "last_step": last,
        "seconds": named,
    }


def test_steps_done_again_count_as_lost():
    """Worked by hand: 100 steps in 100 s, of which 40 are done again; 50 s down; 60 steps more. 160 - 40 of 250 s."""
    runs = [
        attempt(0, 110, 0, 100, train=100, start_up=10),
        attempt(160, 250, 60, 120, train=60, start_up=10, save=20),
    ]
    numbers = summary(runs)
    assert numbers["goodput"] == pytest.approx((100 - 40 + 60) / 250)
    assert (numbers["lost_steps"], numbers["restarts"]) == (40, 1)
    assert (numbers["lost_down_s"], numbers["lost_start_up_s"], numbers["lost_save_s"]) == (
        50,
        20,
        20,
    )
    assert numbers["lost_repeated_s"] == pytest.approx(40)


def test_a_second_start_continues_the_account(tmp_path):
    first = Goodput(tmp_path, Clock())
    first.begin(0)
    assert first.write(10)["goodput/restarts"] == 0
    second = Goodput(tmp_path, Clock())
    second.begin(7)
    numbers = second.write(8)
    assert (numbers["goodput/restarts"], numbers["goodput/lost_steps"]) == (1, 3)


def test_an_attempt_that_a_power_cut_emptied_does_not_stop_the_next_start(tmp_path):
    """The files are not synced at every logged step; an empty one is left out of the account."""
    Goodput(tmp_path, Clock()).begin(0)
    folder = tmp_path / "logs" / "attempts"
    (folder / "0001.json").write_bytes(b"")
    third = Goodput(tmp_path, Clock())
    assert third.path == folder / "0002.json"
    assert len(third.earlier) == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"seconds": 3}', b"\xff", b'{"a": 1}'])
def test_a_file_that_is_no_attempt_is_passed_over(tmp_path, content):
    """Power cuts leave empty files, people leave anything: none of it keeps a run from starting."""
    folder = tmp_path / "logs" / "attempts"
    folder.mkdir(parents=True)
    (folder / "0000.json").write_bytes(content)
    (folder / "notes.json").write_bytes(b"mine")
    goodput = Goodput(tmp_path, Clock())
    goodput.begin(0)
    assert goodput.write(1)["goodput/restarts"] == 0
    assert (folder / "0000.json").read_bytes() == content, "it is not ours to overwrite"
    assert (folder / "0001.json").exists()


def test_an_account_that_cannot_be_written_goes_on_in_memory(tmp_path):
    """A full disk or a file in the place of logs/: the numbers of this start are still right."""
    (tmp_path / "logs").write_text("in the way")
    goodput = Goodput(tmp_path, Clock())
    goodput.begin(0)
    assert goodput.write(3)["goodput/lost_steps"] == 0
