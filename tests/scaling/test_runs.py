"""The runs of a ladder: made once, read when they are whole."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, DataError, MachineError
from pipeline.scaling import runs
from pipeline.scaling.ladder import Rung, lay_out
from tests.support.campaign_run import wait_for
from tests.support.ladders import VOCAB, ladder, write_run
from tests.support.waiting import HANG_S


@pytest.fixture(scope="module")
def laid_out() -> Rung:
    """The largest run of a ladder."""
    return lay_out(ladder(), world_size=1, vocab_size=VOCAB)[-1]


@pytest.fixture
def rung(laid_out, tmp_path) -> Rung:
    """The same, its folder below tmp_path."""
    return replace(laid_out, cfg=replace(laid_out.cfg, runs_dir=str(tmp_path)))


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """Puts a script in the place of launch/local.sh; it gets the run's folder as $RUN."""

    def put(script: str, rung: Rung) -> None:
        path = tmp_path / "launcher"
        path.write_text(f"#!/bin/bash\nRUN={runs.run_dir(rung)}; mkdir -p $RUN\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(runs, "LAUNCHER", path)

    return put


def test_a_run_is_made_by_the_launcher_with_the_ladders_settings(rung, launcher):
    launcher('printf "%s\\n" "$@" > $RUN/words; touch $RUN/DONE', rung)
    runs.make(rung, processes=3)
    words = (runs.run_dir(rung) / "words").read_text().splitlines()
    assert words == ["3", *rung.words]


def test_an_installed_wheel_has_no_launcher_and_makes_runs_of_one_process(rung, monkeypatch):
    """`pretrain scaling` ended in a FileNotFoundError without the clone."""
    monkeypatch.setattr(runs, "LAUNCHER", Path("/no/clone/launch/local.sh"))
    seen = []
    monkeypatch.setattr(runs, "_started", lambda command, _: seen.append(command) or nullcontext(Ended))  # fmt: skip
    with pytest.raises(MachineError, match="with exit code 7"):
        runs.make(rung, processes=1)
    assert seen == [[sys.executable, "-m", "pipeline.train", *rung.words]]
    runs.check_can_make(processes=1)
    with pytest.raises(ConfigError, match="processes=2 needs launch/local.sh"):
        runs.check_can_make(processes=2)


class Ended:
    """A run that has ended."""

    wait = staticmethod(lambda: 7)


def test_a_run_that_ends_early_ends_the_command(rung, launcher):
    launcher("exit 3", rung)
    with pytest.raises(MachineError, match="w32-5120 ended before its last step, with exit code 3"):
        runs.make(rung, processes=1)


def test_a_notice_reaches_the_run_which_saves_before_it_ends(rung, launcher, monkeypatch):
    """A scheduler asks the command, as soon as it has begun; who must save is its child."""
    launcher("trap 'touch $RUN/told; exit 0' USR2\ntouch $RUN/hears\nsleep 20 & wait $!", rung)
    start = subprocess.Popen

    def started(*words, **options):
        child = start(*words, **options)
        assert wait_for((runs.run_dir(rung) / "hears").exists, HANG_S)
        os.kill(os.getpid(), signal.SIGUSR2)  # the command does not know its child yet
        return child

    monkeypatch.setattr(runs.subprocess, "Popen", started)
    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(MachineError, match="ended before its last step"):
        runs.make(rung, processes=1)
    assert (runs.run_dir(rung) / "told").exists()
    assert signal.getsignal(signal.SIGUSR2) == before


def test_a_run_is_done_once_and_with_these_settings(rung):
    """What is done is not made again; a ladder that was edited meanwhile is not mixed with it."""
    assert not runs.is_done(rung)
    write_run(rung, 3.0, until=0.5)
    assert not runs.is_done(rung)
    write_run(rung, 3.0)
    assert runs.is_done(rung)
    changed = replace(rung.cfg, optimizer=replace(rung.cfg.optimizer, lr=0.5))
    with pytest.raises(ConfigError, match=r"optimizer.lr: 0.0006 then, 0.5 now"):
        runs.is_done(replace(rung, cfg=changed))
    older = (runs.run_dir(rung) / "config.yaml").read_text().replace("  beta2: 0.95\n", "")
    (runs.run_dir(rung) / "config.yaml").write_text(older)
    assert runs.is_done(rung), "a setting that came later is no change"
    free = replace(rung.cfg, training=replace(rung.cfg.training, eval_every=7))
    assert runs.is_done(replace(rung, cfg=free))


def test_the_loss_is_the_held_out_one_after_the_last_step(rung):
    folder = write_run(rung, 3.25)
    run = runs.read(rung, held_out=None)
    assert (run.loss, run.parameters, run.tokens) == (3.25, rung.parameters, rung.tokens)
    assert run.course[-1] == pytest.approx(3.25, rel=0.02) and run.course[0] > run.course[-1]
    with pytest.raises(DataError, match="no loss on books after the last step"):
        runs.read(rung, held_out="books")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    second = {key.replace("validation", "books"): value for key, value in last.items()}
    (folder / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(second)]))
    with pytest.raises(DataError, match="losses of books, validation; one counts"):
        runs.read(rung, held_out=None)
    assert runs.read(rung, held_out="books").loss == 3.25
    (folder / "metrics.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(DataError, match="no dataset; one counts. Set data.validation"):
        runs.read(rung, held_out=None)


def test_runs_on_other_data_are_not_mixed(rung):
    """The same settings read other text once a dataset is prepared anew."""
    write_run(rung, 3.0)
    run = runs.read(rung, held_out=None)
    runs.check_same_data([run, run])
    with pytest.raises(DataError, match=r"read different data \(identities aaaaaaaaaaaa and bbbb"):
        runs.check_same_data([run, replace(run, name="other", datasets={"b" * 64: {}})])


def test_the_course_of_an_unfinished_run_ends_where_it_is(rung):
    from pipeline.tracking.history import History

    course = runs.course(History.load(write_run(rung, 3.0, until=0.5)), total_tokens=rung.tokens)
    assert [math.isnan(loss) for loss in course] == [False] * 7 + [True] * 10


def test_the_launcher_is_there():
    assert Path(runs.LAUNCHER).is_file()
