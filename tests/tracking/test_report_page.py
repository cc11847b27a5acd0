"""The page of a run that has hardly begun, met numbers that are none, or is being written."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.report import ReportConfig, main
from tests.support.plant import Lead
from tests.support.small_runs import overrides, write_data
from tests.support.waiting import HANG_S
from tests.test_report import step_row, write

ROOT = Path(__file__).resolve().parents[2]


def blue_pixels(picture: bytes) -> int:
    """Of the run's colour."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
    return int((abs(pixels - (0x44, 0x77, 0xAA)).sum(-1) < 30).sum())


def test_a_run_of_one_step_that_was_never_evaluated_is_drawn(tmp_path, capsys):
    """A line of one point is none: the pictures were empty, and `None.` said nothing of what to do."""
    main(ReportConfig(run=str(write(tmp_path, [step_row(1, 3.0)]))))
    page = (tmp_path / "report" / "index.html").read_text()
    pictures = dict(re.findall(r'alt="([^"]*)" src="data:image/png;base64,([^"]*)"', page))
    seen = {title: blue_pixels(base64.b64decode(png)) for title, png in pictures.items()}
    assert len(seen) == 6 and "Throughput, tokens per second" not in seen and min(seen.values()) > 0
    assert "101 tokens/s" in page and "training loss 3.0000," in page
    assert "None yet: training evaluates every training.eval_every steps" in page
    assert "held out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "losses, told",
    [([3.0, None, 2.5], "training loss 2.5000,"), ([3.0, None, None], "training loss 3.0000 after step 1, no number since,"),
     ([None, None], "training loss no number,")],
)  # fmt: skip
def test_skipped_steps_have_no_loss_and_the_report_says_so(losses, told, tmp_path, capsys):
    """A step with NaN is skipped and logged; `training loss nan` was told of a run that is well."""
    rows = [step_row(step, loss) | {"resilience/skipped_steps": 1} for step, loss in enumerate(losses, 1)]  # fmt: skip
    run, other = write(tmp_path / "a", rows), write(tmp_path / "b", [step_row(1, 2.0)])
    main(ReportConfig(run=str(run), beside=[str(other)]))
    page = re.sub("src=[^>]*", "", (run / "report" / "index.html").read_text())
    assert told in page and "1 skipped steps" in page and "nan" not in page


@pytest.mark.slow
def test_a_run_is_reported_while_it_is_written(tmp_path):
    """A real one from before its first step to its fifth, whose third is skipped for its NaN; then it is killed."""
    data = write_data(tmp_path / "data")
    settings = {"training.eval_every": 0, "training.total_steps": 8, "checkpoint.save_every": 100}
    words = ["-m", "pipeline.train", *overrides(data, tmp_path, **settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PLANT": f"{Lead(tmp_path / 'until', to=5).plant} nan=20"}  # fmt: skip
    command = [sys.executable, "tests/support/plant.py", *words]
    run, steps, deadline = tmp_path / "run", [0], time.monotonic() + HANG_S
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log)
    try:
        while steps[-1] < 5:
            assert process.poll() is None and time.monotonic() < deadline, (
                tmp_path / "log"
            ).read_text()
            try:
                steps.append(reported_step(run))
            except DataError as error:
                assert "there is no" in str(error) or "no logged step yet" in str(error)
    finally:
        process.kill()
        process.wait()
    assert steps == sorted(steps) and reported_step(run) == 5
    assert "1 skipped steps" in (run / "report" / "index.html").read_text()


def reported_step(run: Path) -> int:
    """The last step of a new report."""
    main(ReportConfig(run=str(run)))
    page = (run / "report" / "index.html").read_text()
    found = re.search(r"<p>Step (\d+)", page)
    assert page.endswith("</html>\n") and found is not None
    return int(found[1])
