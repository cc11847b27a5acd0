"""A prediction: kept as it was written, and held against the run it speaks of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.planning.flops import num_parameters
from pipeline.scaling import runs
from pipeline.scaling.ladder import lay_out, lay_out_targets
from pipeline.scaling.law import fit
from pipeline.scaling.prediction import FILE, Prediction, predict
from pipeline.tracking.history import History
from tests.support.ladders import LAW, VOCAB, ladder, write_ladder, write_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(prediction, target) of a ladder whose losses are those of LAW."""
    config = ladder(tmp_path_factory.mktemp("runs"))
    rungs = lay_out(config, world_size=1, vocab_size=VOCAB)
    target = lay_out_targets(config, rungs, world_size=1, vocab_size=VOCAB)[0]
    write_ladder(rungs, noise=0.001)
    found = [runs.read(rung, held_out=None) for rung in rungs]
    columns = (
        np.array([getattr(run, key) for run in found], float)
        for key in ("parameters", "tokens", "loss")
    )
    total = num_parameters(target.cfg.model, VOCAB)
    law = fit(*columns, num_draws=100)
    prediction = predict(law, found, target, ladder="ladder", num_parameters=total, level=0.9)
    return prediction, target


def in_folder(target, folder):
    return replace(target, cfg=replace(target.cfg, runs_dir=str(folder)))


def test_the_prediction_is_near_the_law_and_comes_back_from_its_file(made, tmp_path):
    prediction, target = made
    truth = LAW.loss(target.parameters, target.tokens)
    assert prediction.low < prediction.loss < prediction.high
    assert prediction.loss == pytest.approx(truth, rel=0.02)
    assert prediction.times_largest > 8
    assert Prediction.load(tmp_path) is None
    (tmp_path / FILE).write_bytes(prediction.to_json())
    assert Prediction.load(tmp_path) == prediction
    (tmp_path / FILE).write_bytes(prediction.to_json().replace(b'"loss"', b'"lost"'))
    with pytest.raises(DataError, match="is not what pipeline.scaling writes: it has no loss"):
        Prediction.load(tmp_path)
    for low, high in ((3.0, 2.0), (float("nan"), 3.0), (2.0, float("inf")), (-1.0, 3.0)):
        (tmp_path / FILE).write_bytes(replace(prediction, low=low, high=high).to_json())
        with pytest.raises(DataError, match="an interval is none"):
            Prediction.load(tmp_path)


def test_a_run_as_predicted_is_not_warned_of_on_its_way_or_at_its_end(made, tmp_path):
    """Its training loss lies above the law until the end, as those of the ladder's runs did."""
    prediction, target = made
    for until in (0.3, 0.7, 1.0):
        folder = write_run(in_folder(target, tmp_path), prediction.loss, until=until)
        assert [*prediction.misses(History.load(folder))] == []
    assert prediction.ends(History.load(folder)) == {"validation": prediction.loss}


def test_a_run_that_leaves_the_prediction_is_told_where(made, tmp_path):
    prediction, target = made
    folder = write_run(in_folder(target, tmp_path), 1.2 * prediction.loss, until=0.5)
    found = [*prediction.misses(History.load(folder))]
    assert len(found) == 7 and all("above the predicted" in text for text in found)
    assert found[-1].startswith("at 50% of its tokens the training loss, ")
    folder = write_run(in_folder(target, tmp_path), 0.8 * prediction.loss)
    found = [*prediction.misses(History.load(folder))]
    assert "below the predicted" in found[0]
    assert found[-1].startswith("the last held-out loss (validation), ")


def test_another_run_than_the_predicted_one_is_noticed(made, tmp_path):
    """A prediction copied beside another model, other data or a longer run says nothing of it."""
    prediction, target = made
    history = History.load(write_run(in_folder(target, tmp_path), prediction.loss))
    for changed, said in (
        ({"num_parameters": 7}, "of a model of 7 parameters"),
        ({"datasets": ["c" * 64]}, "of a run on other data"),
        ({"tokens": 20000}, "of a run of 20,000 tokens; this one is longer"),
    ):
        assert said in "\n".join(replace(prediction, **changed).misses(history))
