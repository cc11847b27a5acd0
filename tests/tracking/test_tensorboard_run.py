"""TensorBoard's own reader sees each point once, whatever happened to the run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline.config.choices import XAxis
from pipeline.tracking.samples import Sample
from pipeline.tracking.tensorboard_run import TensorboardRun
from pipeline.tracking.tracker import At

pytest.importorskip("tensorboard")


def seen(folder: Path):
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def at(step: int) -> At:
    return At(step, 32 * step, 1000.0 + step)


def text_of(reader, tag: str) -> str:
    (event,) = reader.Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("axis", list(XAxis))
def test_restart_and_rollback_hide_the_points_that_are_done_again(
    tmp_path: Path, axis: XAxis
) -> None:
    """A killed process (its file is never closed), a second start at step 3, a rollback to step 4."""
    killed = TensorboardRun(axis, run_dir=tmp_path, config={"seed": 1})
    killed.open(at(0))
    for step in range(1, 6):
        killed.log(at(step), {"train/loss": 1.0, "throughput/mfu": None, "moe/load": [1, 2]})
    second = TensorboardRun(axis, run_dir=tmp_path, config={"seed": 1})
    second.open(at(3))
    second.log(at(4), {"train/loss": 2.0})
    second.log(at(5), {"train/loss": 2.0, "data/sample_hash": "abc"})
    second.log(at(5), {"val/a/loss": 5})
    second.open(at(4))
    second.log(at(5), {"train/loss": 3.0})
    second.close(0)
    reader = seen(tmp_path / "tensorboard" / f"by-{axis.name}")
    points = [(event.step, event.value, event.wall_time) for event in reader.Scalars("train/loss")]
    unit = 32 if axis is XAxis.tokens else 1
    losses = [1.0, 1.0, 1.0, 2.0, 3.0]
    assert points == [(unit * n, loss, 1000.0 + n) for n, loss in enumerate(losses, start=1)]
    assert reader.Scalars("val/a/loss") == [], "the evaluation of step 5 is to come again"
    killed.close(1)


def test_a_clock_that_is_put_back_hides_no_later_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are read by name, and names begin with the second: the later ones came first, and hid nothing."""
    clock = [9000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    for number, (second, first) in enumerate([(9000.0, 1), (9000.4, 2), (20.0, 3), (20.0, 4)]):
        clock[0] = second
        run = TensorboardRun(XAxis.step, run_dir=tmp_path, config={})
        run.open(at(first - 1))
        run.log(at(first), {"train/loss": float(number)})
        run.log(at(first + 1), {"train/loss": 9.0})
        run.close(0)
    points = seen(tmp_path / "tensorboard/by-step").Scalars("train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 0.0), (2, 1.0), (3, 2.0), (4, 3.0), (5, 9.0)]  # fmt: skip
    assert len(list((tmp_path / "tensorboard/by-step").glob("events.*"))) == 4


def test_what_is_not_so_any_more_is_a_blank(tmp_path: Path) -> None:
    run = TensorboardRun(XAxis.step, run_dir=tmp_path, config={})
    run.open(at(0))
    run.summarize(at(3), {"best/loss": None})
    run.close(0)
    assert "| best/loss |  |" in text_of(seen(tmp_path / "tensorboard/by-step"), "summary")


def test_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    """A sample may well look like Markdown."""
    run = TensorboardRun(XAxis.step, run_dir=tmp_path, config={"model": {"name": "tiny"}})
    run.open(at(0))
    run.log_samples(at(2), [Sample("# a", "\n<b>"), Sample("", "é")])
    run.summarize(at(3), {"best/loss": 2.5, "best/step": 2})
    run.keep_model(at(3), tmp_path / "exported", {"dtype": "bf16"})
    run.close(0)
    reader = seen(tmp_path / "tensorboard" / "by-step")
    assert text_of(reader, "samples/0") == "    # a\n    <b>"
    assert text_of(reader, "samples/1") == "    é"
    assert "| best/loss | 2.5 |" in text_of(reader, "summary")
    assert str(tmp_path / "exported") in text_of(reader, "model")
    assert '"name": "tiny"' in text_of(reader, "config")
