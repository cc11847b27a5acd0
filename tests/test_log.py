"""Rank 0 speaks; the others only warn, and say who they are."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import log
from tests.support.log_lines import unbroken
from tests.support.small_runs import overrides, write_data

ROOT = Path(__file__).resolve().parents[1]

SPEAK = """
import sys
from pipeline import log
log.setup(global_rank=int(sys.argv[1]))
log.setup(global_rank=int(sys.argv[1]))
log.logger.info("step 1")
log.logger.warning("slow disk")
"""


@pytest.mark.parametrize(
    "rank, lines", [(0, ["I step 1", "W slow disk"]), (3, ["[rank 3] W slow disk"])]
)
def test_ranks_above_0_only_warn(rank, lines):
    """A thousand ranks that all speak make a log that nobody reads; set up twice, nothing is said twice."""
    done = subprocess.run(
        [sys.executable, "-c", SPEAK, str(rank)], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert [line.partition(" ")[2] for line in done.stderr.splitlines()] == lines


def test_a_message_commands_no_terminal():
    code = "from pipeline import log; log.setup(); log.logger.info('a\\x1b[2Jb\\udcff')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.endswith("I a\\x1b[2Jb\\udcff\n")


def test_what_is_printed_commands_no_terminal(capsys, monkeypatch):
    """Names and texts of files are printed too; a byte that is no UTF-8 would end a strict stream."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log.open_standard_streams()
    log.open_standard_streams()
    print("a\x1b[2J\udcff\tb", "\x1b[32mgreen\x1b[0m")
    sys.stdout.flush()
    assert capsys.readouterr().out == "a\\x1b[2J\\udcff\tb \x1b[32mgreen\x1b[0m\n"


PRINT = """
from pipeline import log
log.open_standard_streams()
print("a\\fb\\x1b[2J\\u2028\\xe9\\udcff", end="")
"""


@pytest.mark.parametrize(
    "encoding, written",
    [
        ("utf-8", "a\fb\x1b[2J\u2028\xe9\\udcff"),
        ("ascii", "a\fb\x1b[2J\\u2028\\xe9\\udcff"),
    ],
)
def test_a_file_gets_what_is_printed(encoding, written):
    """Samples are kept in files: a form feed in one is its text. No encoding ends the command."""
    done = subprocess.run(
        [sys.executable, "-c", PRINT],
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert done.stdout == written.encode()


@pytest.mark.parametrize(
    "num_bytes, words",
    [(0, "0 MiB"), (1000, "0.1 MiB"), (9.5e6, "9.1 MiB"), (14e6, "13 MiB"), (1e12, "931.3 GiB")],
)
def test_bytes_are_said_in_units_in_which_they_are_not_zero(num_bytes, words):
    """A checkpoint of a small model had 0.01 GiB."""
    assert log.in_units(num_bytes) == words


@pytest.mark.parametrize("rank", [0, 1023])
def test_long_messages_are_broken_between_words(rank, capsys, monkeypatch):
    """The terminal of a newcomer has 80 columns; a warning was 160 wide, the line of a checkpoint 82."""
    monkeypatch.setattr(log.logger, "handlers", [])
    log.setup(global_rank=rank)
    words = "four ranks wait for each-other " * 5
    log.logger.warning("%sor\n%s", words, "table  of two")
    shown = capsys.readouterr().err.splitlines()
    assert all(len(line) <= 78 for line in shown) and shown[-1].endswith("W table  of two")
    parts = [line.partition(" W ")[2] for line in shown[:-1]]
    assert " ".join(part.strip() for part in parts) == words + "or"
    assert [part.startswith("  ") for part in parts] == [False] + [True] * (len(parts) - 1)


def test_a_path_is_not_broken(capsys, monkeypatch):
    """It is copied from the terminal, and found again by its text."""
    monkeypatch.setattr(log.logger, "handlers", [])
    log.setup()
    path = "/long-name" * 12
    log.logger.info("checkpoint %s written", path)
    assert path in capsys.readouterr().err


@pytest.mark.slow
def test_every_line_of_a_run_fits_a_terminal(tmp_path):
    """Start, steps, evaluations, saves, the best, a resume, a notice; nothing is a repr, or 0 of a unit."""
    write_data(tmp_path / "data")
    command = [sys.executable, "-m", "pipeline.train"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = []
    for total_steps, until in ((4, None), (100_000, "step 6/")):
        settings = {"training.total_steps": total_steps, "training.eval_every": 2, "checkpoint.save_every": 2,
                    "training.sample_every": 2, "checkpoint.keep_best": "true", "training.sample_tokens": 4}  # fmt: skip
        with subprocess.Popen(
            [*command, *overrides(Path("data"), Path("runs"), **settings)], cwd=tmp_path, env=environment,
            stderr=subprocess.PIPE, text=True,
        ) as run:  # fmt: skip
            assert run.stderr is not None
            for line in run.stderr:
                said.append(line.rstrip("\n"))
                if until and until in line:
                    run.send_signal(signal.SIGTERM)
                    until = None
        assert run.returncode == 0, said
    text = "\n".join(said)
    for part in ("parameters", "a rank holds about", "building the model", "held out validation", "writes: ", " MiB in ",
                 "is the best so far", "done at step 4", "will be read", "resumed from runs/run/checkpoints/step-00000004",
                 "SIGTERM heard", "leaving on notice"):  # fmt: skip
        assert part in unbroken(text), f"{part}\n{text}"
    assert [line for line in said if len(line) > 78] == []
    ours = "\n".join(line for line in said if "writes: " not in line)
    assert not re.search(r"\w\(\w+=|Path\(|<\w| 0(\.0)? [KMG]iB|\bNone\b", ours), ours
