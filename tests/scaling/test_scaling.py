"""The command, on runs that are written instead of made: what it prints, writes and refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, DataError
from pipeline.scaling import runs
from pipeline.scaling.__main__ import ScalingConfig, main
from pipeline.scaling.ladder import lay_out, lay_out_targets
from pipeline.scaling.prediction import FILE, Prediction
from tests.support.ladders import ladder, write_ladder, write_run
from tests.support.small_runs import write_data

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def laid_out(data):
    """The ladder's runs and target, with the data's own vocabulary; their folders are below runs/."""
    from pipeline.data.manifest import Manifest

    vocab_size = Manifest.load(data / "train").tokenizer.vocab_size
    rungs = lay_out(ladder(data=data), world_size=1, vocab_size=vocab_size)
    targets = lay_out_targets(ladder(data=data), rungs, world_size=1, vocab_size=vocab_size)
    return rungs, targets


@pytest.fixture
def settings(data, laid_out, tmp_path, monkeypatch):
    """Settings of a ladder in a folder of its own, all of whose runs are done."""
    monkeypatch.chdir(tmp_path)
    write_ladder(laid_out[0])
    monkeypatch.setattr("pipeline.scaling.__main__.lay_out", lambda *_, **__: laid_out[0])
    monkeypatch.setattr("pipeline.scaling.__main__.lay_out_targets", lambda *_, **__: laid_out[1])
    return {"ladder": ladder(data=data), "draws": 100}


def test_a_ladder_that_is_done_is_fitted_and_nothing_is_made_again(settings, monkeypatch, capsys):
    """Card, picture, and the prediction in the folder of the run it speaks of."""
    monkeypatch.setattr(runs, "LAUNCHER", Path("/nothing/must/be/started"))
    main(ScalingConfig(**settings, budget=1e12))
    out = capsys.readouterr().out
    assert "| large | " in out and "- alpha = " in out and "Best for 1e+12 operations" in out
    folder = Path("runs/ladder")
    assert (folder / "card.md").read_text().strip() == out.strip()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    prediction = Prediction.load(folder / "large")
    assert prediction is not None and f"**{prediction.loss:.4f}**" in out


def test_the_prediction_of_a_run_that_has_begun_stays_as_it_was_written(settings, laid_out, capsys):
    """Else the last fit, made with the result in sight, would pass for the first."""
    main(ScalingConfig(**settings))
    first = Path("runs/ladder/large", FILE).read_bytes()
    write_run(laid_out[1][0], 2.0, until=0.1)
    write_run(laid_out[0][0], 9.0)
    main(ScalingConfig(**settings))
    assert Path("runs/ladder/large", FILE).read_bytes() == first
    assert f"**{Prediction.load(Path('runs/ladder/large')).loss:.4f}**" in capsys.readouterr().out


def test_a_run_that_has_begun_without_a_prediction_gets_none(settings, laid_out, capsys):
    """One that is made with its losses in sight would be drawn as if it had been there before."""
    write_run(laid_out[1][0], 2.0, until=0.1)
    main(ScalingConfig(**settings))
    said = capsys.readouterr()
    assert "large has begun without a prediction" in said.err and "| large |" not in said.out
    assert Prediction.load(Path("runs/ladder/large")) is None


def test_a_narrow_interval_is_drawn_although_the_law_lies_beside_it(settings, capsys):
    """Of a bootstrap's middle the fit itself may be no part: matplotlib takes no negative bar."""
    main(ScalingConfig(**settings, level=1e-4))
    prediction = Prediction.load(Path("runs/ladder/large"))
    assert prediction is not None and not prediction.low <= prediction.loss <= prediction.high
    assert Path("runs/ladder/curves.png").read_bytes().startswith(b"\x89PNG")


def test_missing_runs_are_named(settings, laid_out):
    for rung in laid_out[0][:5]:
        (runs.run_dir(rung) / "DONE").unlink()
    with pytest.raises(
        DataError, match="4 runs do not tell five coefficients.*\nthe runs have|Not done: w8-1280"
    ):
        main(ScalingConfig(**settings, run=False))


def test_losses_that_do_not_fall_are_no_law(settings, laid_out):
    """A learning rate that suits one size alone, or runs that never left the first plateau."""
    for rung in laid_out[0]:
        write_run(rung, 2.0 + 0.05 * rung.cfg.model.hidden_size)
    with pytest.raises(DataError, match="do not fall with size and tokens"):
        main(ScalingConfig(**settings))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rung": 9}, r"rung \(9\) must be between 0 and 8"),
        ({"target": "huge"}, "no such target. It has: large"),
        ({"level": 1.0}, r"level \(1.0\) must be between 0 and 1"),
        ({"processes": 0}, r"processes \(0\) must be at least 1"),
        ({"budget": 0.0}, r"budget \(0.0\) must be above 0"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(settings, changes, said):
    with pytest.raises(ConfigError, match=said):
        main(ScalingConfig(**{**settings, **changes}))


@pytest.mark.slow
def test_a_task_of_an_array_makes_its_run_through_the_launcher(data, tmp_path):
    """A real run, from the ladder's settings to a loss that the fit reads; then it is done."""
    shared = ["model=tiny", "model.num_layers=2", "training.precision=fp32", "training.seq_len=32",
              "training.global_batch_size=8", "tracking=local"]  # fmt: skip
    words = [
        "ladder=quickstart", f"ladder.runs_dir={tmp_path}", "rung=0", "ladder.sizes.w16.tokens=[2048,4096,8192]",
        f"ladder.settings={[f'data.path={data}', *shared]}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "pipeline.scaling", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "quickstart-ladder" / "w16-2048"
    assert (folder / "DONE").read_text() == "8\n"
    written = (folder / "metrics.jsonl").stat().st_mtime
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and (folder / "metrics.jsonl").stat().st_mtime == written
